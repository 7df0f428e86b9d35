"""Verbs that report: arguments in, screens out."""
