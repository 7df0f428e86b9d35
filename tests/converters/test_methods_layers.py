"""Methods over layers that few models have: convolutions of one and three dimensions, biases under other names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import oracle
from oracle.bases import Base
from oracle.command import merged
from oracle.expected import one_thread
from oracle.families import make_family
from oracle.methods import make_method_adapter, make_video_base


def expect_pefts_bits(base: Base, kind: str, tmp_path: Path, **settings: Any) -> None:
    adapter = make_method_adapter(tmp_path / "adapter", base, kind, **settings)
    with one_thread():
        expected = oracle.peft_merge(base, adapter)
    merged(adapter, tmp_path / "out", "--base", base.path, "--numerics", "peft")
    oracle.same_bits(oracle.read_tensors(tmp_path / "out"), expected)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["LoraConfig", "LoHaConfig", "LoKrConfig", "HiraConfig"])
def test_convolutions_of_one_dimension_merge_to_pefts_bits(kind: str, tmp_path: Path) -> None:
    base = make_family(tmp_path / "base", "whisper")
    expect_pefts_bits(base, kind, tmp_path, r=3, target_modules=["conv1", "conv2"])


def test_convolutions_of_three_dimensions_merge_to_pefts_bits(tmp_path: Path) -> None:
    base = make_video_base(tmp_path / "base")
    expect_pefts_bits(base, "LoraConfig", tmp_path, r=3, lora_alpha=5, target_modules=["projection", "query"])


def test_a_bias_that_is_called_otherwise_on_disk_is_scaled_with_its_weight(tmp_path: Path) -> None:
    """VideoMAE's `q_bias` lies beside the layer whose bias it is in memory."""
    base = make_video_base(tmp_path / "base")
    settings = {"target_modules": ["projection", "query"], "feedforward_modules": []}
    expect_pefts_bits(base, "IA3Config", tmp_path, **settings)
    name = "videomae.encoder.layer.0.attention.attention.q_bias"
    assert not torch.equal(oracle.read_tensors(tmp_path / "out")[name], oracle.read_tensors(base.path)[name])


def test_an_adalora_whose_ranks_were_cut_merges_to_pefts_bits(tmp_path: Path) -> None:
    """`rank_pattern` says which directions are left, and PEFT still divides by the rank that training began with."""
    base = oracle.make_base(tmp_path / "base", "llama")
    whole = make_method_adapter(
        tmp_path / "whole", base, "AdaLoraConfig", init_r=4, total_step=10, target_modules=["q_proj"]
    )
    masks = {f"model.layers.{n}.self_attn.q_proj.lora_E": [True, n == 0, False, True] for n in (0, 1)}

    def cut(tensors: dict[str, Any]) -> dict[str, Any]:
        found = {}
        for key, value in tensors.items():
            mask = torch.tensor(masks[key.removeprefix("base_model.model.").rpartition(".")[0] + ".lora_E"])
            found[key] = value[:, mask] if key.endswith("lora_B") else value[mask]
        return found

    adapter = oracle.rewrite_adapter(whole, tmp_path / "cut", change=cut)
    oracle.bases.edit_config(adapter, "adapter_config.json", rank_pattern=masks)
    with one_thread():
        expected = oracle.peft_merge(base, adapter)
    merged(adapter, tmp_path / "out", "--base", base.path, "--numerics", "peft")
    oracle.same_bits(oracle.read_tensors(tmp_path / "out"), expected)
