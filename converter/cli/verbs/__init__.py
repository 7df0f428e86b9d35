"""Verbs as Typer sees them: names, arguments, help."""
