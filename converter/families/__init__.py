"""What transformers names, shapes and ties, by model type: data and rules, without transformers."""
