"""Hugging Face folders: models, PEFT adapters, and what is left of broken ones."""
