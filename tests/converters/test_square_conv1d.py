"""A square weight shows no orientation: GPT-2's `c_proj` is a Conv1D, and the merge is PEFT's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

from oracle.bases import quiet
from oracle.command import merged

SIZES = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 48, "n_positions": 32}


@pytest.mark.parametrize("numerics", ["best", "peft"])
def test_a_square_conv1d_is_merged_as_peft_merges_it(numerics: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    GPT2LMHeadModel(GPT2Config(**SIZES)).save_pretrained(tmp_path / "base")
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["attn.c_proj"], fan_in_fan_out=True, init_lora_weights=False)
    load = GPT2LMHeadModel.from_pretrained
    with quiet():
        get_peft_model(load(tmp_path / "base"), config).save_pretrained(tmp_path / "adapter")
        whole = PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "adapter").merge_and_unload()
    merged(tmp_path / "adapter", tmp_path / "out", "--base", tmp_path / "base", "--numerics", numerics)
    found = load_file(tmp_path / "out" / "model.safetensors")
    before = load_file(tmp_path / "base" / "model.safetensors")
    changed = 0
    for name, value in whole.state_dict().items():
        key = name if name in found else name.removeprefix("transformer.")
        if key in found:
            torch.testing.assert_close(found[key], value, rtol=1e-6, atol=1e-7)
            changed += not torch.equal(found[key], before[key])
    assert changed == SIZES["n_layer"]
