"""Names and shapes of megatron-core's GPT models against those of transformers: one table for both ways."""
