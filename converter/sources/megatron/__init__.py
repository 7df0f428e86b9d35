"""Megatron-core's checkpoints, whoever's run they are of."""
