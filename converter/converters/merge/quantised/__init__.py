"""Quantised checkpoints: whole weights of them, and what of a changed one can stay as it lies."""
