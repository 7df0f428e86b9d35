"""Prefixes of a user's own class: they come off where the model is whole without them, and nowhere else."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import transformers

from converter.families.foreign import foreign

SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "vocab_size": 64,
}  # fmt: skip
CLASSES = [
    ("LlamaForCausalLM", "LlamaConfig", {}),
    ("LlamaForSequenceClassification", "LlamaConfig", {"num_labels": 1}),
    ("Qwen2ForCausalLM", "Qwen2Config", {"tie_word_embeddings": True}),
    ("Qwen3ForCausalLM", "Qwen3Config", {"head_dim": 16}),
    ("GPT2LMHeadModel", "GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 2}),
    ("GPTNeoXForCausalLM", "GPTNeoXConfig", {}),
    ("BloomForCausalLM", "BloomConfig", {"n_layer": 2, "n_head": 2}),
    ("OPTForCausalLM", "OPTConfig", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    ("MixtralForCausalLM", "MixtralConfig", {"num_local_experts": 2, "num_experts_per_tok": 1}),
    ("T5ForConditionalGeneration", "T5Config", {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2}),
]


def saved(cls: str, config_class: str, more: dict[str, Any], folder: Any) -> tuple[list[str], dict[str, Any]]:
    """Names as transformers' own save writes them, and the config."""
    from safetensors.torch import load_file

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = getattr(transformers, config_class)(**(SIZES | more))
        model = getattr(transformers, cls)(config).to(torch.bfloat16)
        model.save_pretrained(folder)
    return list(load_file(folder / "model.safetensors")), model.config.to_dict()


@pytest.mark.parametrize(("cls", "config_class", "more"), CLASSES, ids=[c for c, _, _ in CLASSES])
@pytest.mark.parametrize("prefix", ["llm.", "net.", "reward_model.backbone.", "policy.module."])
def test_a_prefix_comes_off_where_the_model_is_whole_without_it(
    cls: str, config_class: str, more: dict[str, Any], prefix: str, tmp_path: Any
) -> None:
    names, config = saved(cls, config_class, more, tmp_path)
    found = foreign([prefix + n for n in names], config)
    assert found is not None
    assert sorted(found.names.values()) == sorted(names)
    assert foreign(names, config) is None


@pytest.mark.parametrize(("cls", "config_class", "more"), CLASSES, ids=[c for c, _, _ in CLASSES])
def test_a_prefix_stays_where_a_tensor_of_the_backbone_is_missing_or_one_too_many(
    cls: str, config_class: str, more: dict[str, Any], tmp_path: Any
) -> None:
    names, config = saved(cls, config_class, more, tmp_path)
    layers = [n for n in names if any(part.isdecimal() for part in n.split("."))]
    hole = [f"llm.{n}" for n in names if n != layers[-1]]
    assert foreign(hole, config) is None
    assert foreign([f"llm.{n}" for n in [*names, layers[0].replace(".0.", ".77.")]], config) is None


def test_a_head_beside_the_prefix_keeps_its_name(tmp_path: Any) -> None:
    names, config = saved("LlamaForCausalLM", "LlamaConfig", {}, tmp_path)
    found = foreign([*(f"llm.{n}" for n in names), "reward_head.weight"], config)
    assert found is not None
    assert found.names["reward_head.weight"] == "reward_head.weight"
    assert found.names["llm.lm_head.weight"] == "lm_head.weight"


def test_a_family_that_nobody_knows_keeps_its_names() -> None:
    config = {"model_type": "unheard-of", "architectures": ["UnheardOf"]}
    assert foreign(["llm.a.weight", "llm.b.weight"], config) is None
