"""Folders and plans that become repositories on the Hub."""
