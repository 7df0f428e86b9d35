"""Heads of a size of their own where transformers' config does not declare `head_dim`: Qwen3-30B-A3B has such."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import transformers

from converter.families.expected import Expected, compare, expected

_PUBLISHED = {
    "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 2048, "head_dim": 128,
    "num_attention_heads": 32, "num_key_value_heads": 4, "num_hidden_layers": 1, "num_experts": 2,
    "num_experts_per_tok": 2, "moe_intermediate_size": 768, "intermediate_size": 6144, "vocab_size": 151936,
    "tie_word_embeddings": False,
}  # fmt: skip
"""Qwen3-30B-A3B's config.json with one layer and two experts."""


def test_what_is_asked_for_are_the_shapes_of_the_live_model() -> None:
    fields: dict[str, Any] = dict(_PUBLISHED)
    config = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_config(config)
    live = {n: tuple(t.shape) for n, t in model.state_dict().items()}
    assert live["model.layers.0.self_attn.q_proj.weight"] == (4096, 2048)
    wanted = expected(_PUBLISHED)
    assert isinstance(wanted, Expected)
    assert not compare(live, wanted, _PUBLISHED)
