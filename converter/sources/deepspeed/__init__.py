"""DeepSpeed checkpoints: ZeRO 0 to 3, BF16_Optimizer and the universal format."""
