"""Containers of tensors, read and written: safetensors, and torch.save's zip without unpickling."""
