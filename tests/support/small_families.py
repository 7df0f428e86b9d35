"""Causal models of a few families, small enough to be made in a test."""

from __future__ import annotations

from typing import Any

import transformers

_SIZES: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 32,
    "max_position_embeddings": 64, "tie_word_embeddings": False, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip

CONFIGS: dict[str, Any] = {
    "llama": transformers.LlamaConfig(**_SIZES, num_key_value_heads=2),
    "qwen2": transformers.Qwen2Config(**_SIZES, num_key_value_heads=1),
    "gpt2": transformers.GPT2Config(
        n_embd=16, n_layer=2, n_head=2, vocab_size=32, n_positions=64, bos_token_id=1, eos_token_id=2,
        tie_word_embeddings=False,
    ),
    "gpt_neox": transformers.GPTNeoXConfig(**_SIZES),
}  # fmt: skip


def tiny(family: str) -> Any:
    """A fresh causal model of a family."""
    return transformers.AutoModelForCausalLM.from_config(CONFIGS[family]).eval()
