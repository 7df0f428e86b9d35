"""Hostile and damaged inputs as code: what each is, which threat it stands for, and what must be said of it."""
