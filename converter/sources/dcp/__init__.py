"""torch's distributed checkpoints, and what accelerate saves under FSDP."""
