"""Layers that the class of the base passes over (multi-token prediction): PEFT never sees them, so none is lacking."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DeepseekV3Config, Glm4MoeConfig, Qwen3NextConfig

import converter
from converter.errors import Refused

pytestmark = pytest.mark.filterwarnings("ignore")

SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "vocab_size": 64, "moe_intermediate_size": 16, "num_experts_per_tok": 2,
}  # fmt: skip
MLA: dict[str, Any] = {
    "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
}  # fmt: skip
LINEAR: dict[str, Any] = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
FAMILIES = {
    "deepseek_v3": (
        DeepseekV3Config(**SIZES, **MLA, n_routed_experts=4, n_group=2, topk_group=1, first_k_dense_replace=1),
        "model.layers.1.", "model.layers.2.", ["q_a_proj", "o_proj"],
    ),
    "glm4_moe": (
        Glm4MoeConfig(**SIZES, n_routed_experts=4, first_k_dense_replace=1, head_dim=8),
        "model.layers.1.", "model.layers.2.", ["q_proj", "o_proj"],
    ),
    "qwen3_next": (
        Qwen3NextConfig(
            **SIZES | {"num_hidden_layers": 4}, **LINEAR, num_experts=4, head_dim=8, shared_expert_intermediate_size=16
        ),
        "model.layers.3.", "mtp.layers.0.", ["q_proj", "o_proj"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_an_adapter_over_the_layers_that_the_class_has_is_whole(name: str, tmp_path: Path) -> None:
    config, last, further, targets = FAMILIES[name]
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    more = {n.replace(last, further): t.clone() for n, t in weights.items() if n.startswith(last)}
    assert more
    save_file({**weights, **more}, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), LoraConfig(target_modules=targets))
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            parameter.data.normal_(0, 0.1)
    model.save_pretrained(tmp_path / "adapter")
    merged = converter.merge_lora(tmp_path / "adapter", tmp_path / "out", base=tmp_path / "base", numerics="peft")
    assert merged.receipt is not None
    live: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    live.merge_and_unload().save_pretrained(tmp_path / "pefts")
    expected, found = (load_file(tmp_path / f / "model.safetensors") for f in ("pefts", "out"))
    assert {n for n in expected if not torch.equal(expected[n], found[n])} == set()
    assert all(torch.equal(found[n], t) for n, t in more.items())
    factors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    lost = [n for n in factors if ".layers.1." in n or ".layers.3." in n][:2]
    assert lost
    save_file({n: t for n, t in factors.items() if n not in lost}, tmp_path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(Refused):
        converter.merge_lora(tmp_path / "adapter", tmp_path / "other", base=tmp_path / "base")
