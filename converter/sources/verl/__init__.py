"""verl's FSDP checkpoints: one file a rank."""
