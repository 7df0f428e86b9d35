"""Whole weights under a config that says they are quantised: no loader reads them as they are, and none is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from oracle.bases import edit_config
from oracle.command import run

SMALL = {"vocab_size": 24, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 20}
MODELS: dict[str, Any] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=24, n_embd=16, n_layer=1, n_head=2)),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SMALL, num_key_value_heads=2, num_experts=2, moe_intermediate_size=8, num_experts_per_tok=1)
    ),
}
METHODS: dict[str, dict[str, Any]] = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128},
    "awq": {"quant_method": "awq", "bits": 4},
    "fp8": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "none": {},
}


BY_THEMSELVES: list[dict[str, Any]] = [
    {"quant_method": "bitsandbytes", "load_in_4bit": True},
    {"quant_method": "bitnet", "linear_class": "autobitlinear"},
]


@pytest.fixture
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    torch.manual_seed(1)
    MODELS[request.param]().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("folder", MODELS, indirect=True)
def test_it_is_an_error_and_is_not_written(method: str, folder: Path, tmp_path: Path) -> None:
    assert run("verify", folder, "--for", "transformers").code == 0
    edit_config(folder, quantization_config=METHODS[method])
    for typed, code in (
        (("doctor", folder), 1),
        (("verify", folder, "--for", "transformers"), 4),
        (("reshard", folder, tmp_path / "out"), 3),
    ):
        said = run(*typed)
        assert (said.code, "quantisation-left" in said.text or "every weight is whole" in said.text) == (code, True)
    assert run("average", folder, folder, tmp_path / "out").code == 3  # its numbers can't be added
    assert not (tmp_path / "out").exists()
    assert run("reshard", folder, tmp_path / "out", "--allow", "quantisation-left").code == 0
    receipt = json.loads((tmp_path / "out" / "rlhf-convert.json").read_text())
    assert "quantisation-left" in json.dumps(receipt)


@pytest.mark.parametrize(
    "method",
    [
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"quant_method": "bitnet", "linear_class": "autobitlinear"},
    ],
)
@pytest.mark.parametrize("folder", ["llama"], indirect=True)
def test_what_a_load_quantises_by_itself_is_sound(method: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    edit_config(folder, quantization_config=method)
    assert run("doctor", folder).code == 0
    assert run("reshard", folder, tmp_path / "out").code == 0
