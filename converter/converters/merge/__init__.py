"""`merge-lora`: adapters folded into the weights of their base."""
