"""`gather`: a trainer's state becomes a model, an adapter, or both merged."""
