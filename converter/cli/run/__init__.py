"""Verbs that write: arguments in, screens out."""
