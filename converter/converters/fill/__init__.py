"""`fill`: lost tensors, each from the first place that holds exactly its values."""
