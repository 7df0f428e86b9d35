"""A bias in an adapter's file replaces the base's only where the adapter's config says that biases were trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import oracle
from oracle.adapters import rewrite_adapter
from oracle.bases import edit_config
from oracle.command import listing, run

NAME = "model.layers.0.self_attn.q_proj.bias"


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_a_bias_that_the_config_does_not_name_is_refused(tmp_path: Path, bias: str) -> None:
    base = oracle.make_base(tmp_path / "base", "qwen2")
    before = {n: t for n, t in oracle.read_tensors(base.path).items() if n.endswith("_proj.bias")}
    adapter = rewrite_adapter(
        oracle.make_adapter(tmp_path / "sound", base),
        tmp_path / "adapter",
        change=lambda t: t | {f"base_model.model.{n}": torch.full_like(b, 7.0) for n, b in before.items()},
    )
    edit_config(adapter, "adapter_config.json", bias=bias)
    there = listing(tmp_path)
    ran = run("merge-lora", adapter, tmp_path / "out", "--base", base.path)
    if bias == "none":
        assert (ran.code, "adapter-unexpected" in ran.err) == (3, True), ran.err
        assert "_proj.bias" in ran.err
        assert listing(tmp_path) == there
    else:
        assert ran.code == 0, ran.err
        merged = oracle.read_tensors(tmp_path / "out")
        assert NAME in before
        assert all(merged[name].eq(7.0).all() for name in before)
