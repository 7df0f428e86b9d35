"""LoRA over torch's MultiheadAttention, against PEFT's merge and its forward pass."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import oracle
from oracle.bases import Base, _randomise, quiet
from oracle.command import merged, run
from oracle.methods import make_method_adapter

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers


def make_siglip(path: Path, dtype: Any = torch.float32) -> Base:
    """An encoder of images whose pooling is torch's own attention."""
    with quiet():
        config = transformers.SiglipVisionConfig(
            hidden_size=48,
            intermediate_size=80,
            num_hidden_layers=1,
            num_attention_heads=4,
            image_size=32,
            patch_size=16,
        )
        model = transformers.SiglipVisionModel(config)
        _randomise(model, 0)
        model.to(dtype).save_pretrained(path)
    return Base(path, "siglip", False, auto="SiglipVisionModel")


def pooled(model: Any) -> Any:
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    with torch.no_grad(), quiet():
        return model(pixel_values=pixels).pooler_output.double()


def test_both_projections_are_merged_as_peft_merges_them_and_runs_them(tmp_path: Path) -> None:
    base = make_siglip(tmp_path / "base")
    adapter = make_method_adapter(tmp_path / "adapter", base, "LoraConfig", target_modules=["head.attention", "q_proj"],
                                  r=3, lora_alpha=5)  # fmt: skip
    expected = oracle.peft_merge(base, adapter)
    merged(adapter, tmp_path / "peft", "--base", base.path, "--numerics", "peft")
    oracle.same_bits(oracle.read_tensors(tmp_path / "peft"), expected)
    merged(adapter, tmp_path / "best", "--base", base.path)
    with quiet():
        import peft

        wanted = pooled(peft.PeftModel.from_pretrained(base.load(), adapter).eval())
    assert oracle.relative_difference(pooled(base.load()), wanted) > 1e-2
    assert oracle.relative_difference(pooled(oracle.load_output(tmp_path / "best", base.auto)), wanted) < 1e-5


@pytest.mark.slow
def test_pefts_roundings_over_16_bits_are_refused(tmp_path: Path) -> None:
    base = make_siglip(tmp_path / "base", torch.bfloat16)
    adapter = make_method_adapter(tmp_path / "adapter", base, "LoraConfig", target_modules=["head.attention"], r=3)
    ran = run("merge-lora", adapter, tmp_path / "out", "--base", base.path, "--numerics", "peft")
    assert (ran.code, "numerics-attention" in ran.text) == (3, True)
    merged(adapter, tmp_path / "out", "--base", base.path)
    reference = oracle.peft_merge(base, adapter, dtype=torch.float64)
    for name, value in oracle.read_tensors(tmp_path / "out").items():
        distance = (value.double() - reference[name]).abs()
        assert bool((distance <= reference[name].abs() * 2**-8 + 1e-9).all()), name  # half a step of bf16
