"""Fixes of names, configs, ties, vocabularies and sets of weight files."""
