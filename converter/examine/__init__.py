"""Reads and reports, writes nothing: doctor, verify, diff, explain."""
