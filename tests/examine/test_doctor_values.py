"""`doctor --deep`: what only values show, each on a model that transformers wrote and that was then changed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from converter.core.context import Context
from converter.sources.hf.source import SOURCE
from doctored import SIZES, codes, finding, serious, store, value_head


@pytest.fixture
def causal(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(tmp_path / "lm")
    return tmp_path / "lm"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_value_that_is_not_finite_is_counted(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    tensor = torch.randn(300, 7, generator=torch.Generator().manual_seed(1)).to(dtype)
    tensor.view(-1)[:6] = torch.tensor([torch.finfo(dtype).max, -torch.finfo(dtype).max, 0.0, -0.0, 1.0,
                                        torch.finfo(dtype).tiny], dtype=dtype)  # fmt: skip
    tensor.view(-1)[[9, 100, 2000]] = torch.tensor([float("nan"), float("inf"), float("-inf")], dtype=dtype)
    save_file({"a": tensor, "b": torch.ones(3, dtype=dtype)}, folder / "model.safetensors", metadata={"format": "pt"})
    stored = SOURCE.open(folder, asked="m").tensors
    assert Context().nonfinite(stored["a"]) == int((~torch.isfinite(tensor)).sum()) == 3
    assert Context().nonfinite(stored["b"]) == 0


def test_nan_is_found_only_when_values_are_read(causal: Path) -> None:
    store(causal, lambda t: {**t, "model.norm.weight": t["model.norm.weight"] * float("nan")})
    assert codes(causal) == {}
    assert codes(causal, deep=True) == {"nonfinite": "error"}
    assert finding(causal, "nonfinite", deep=True).evidence == ("model.norm.weight: 16",)


def test_a_matrix_of_zeros_changes_numbers(causal: Path) -> None:
    store(causal, lambda t: {n: v * 0 if "q_proj" in n else v for n, v in t.items()})
    assert codes(causal, deep=True) == {"zero-tensors": "changes-numbers"}


def test_a_fresh_head_looks_untrained_and_a_trained_one_does_not(reward: Path) -> None:
    assert codes(reward, deep=True) == {"head-untrained": "cosmetic"}
    store(reward, lambda t: {**t, "score.weight": torch.linspace(-3, 5, 16).reshape(1, 16)})
    assert codes(reward, deep=True) == {}
    store(reward, lambda t: {**t, "score.weight": torch.zeros(1, 16)})
    assert "zero everywhere" in finding(reward, "head-untrained", deep=True).text


def test_a_head_that_is_the_same_in_two_checkpoints_never_learnt(reward: Path, tmp_path: Path) -> None:
    for step in (10, 20):
        shutil.copytree(reward, tmp_path / "run" / f"checkpoint-{step}")
    last = tmp_path / "run" / "checkpoint-20"
    assert serious(codes(last, deep=True)) == {"head-unmoved"}
    store(last, lambda t: {**t, "score.weight": t["score.weight"] + 1})
    assert serious(codes(last, deep=True)) == set()


def test_a_value_head_file_that_is_the_same_in_two_checkpoints_never_learnt(causal: Path, tmp_path: Path) -> None:
    value_head(causal)
    for step in (10, 20):
        shutil.copytree(causal, tmp_path / "run" / f"checkpoint-{step}")
    assert serious(codes(tmp_path / "run" / "checkpoint-20", deep=True)) == {"head-unmoved"}


def test_a_merge_that_equals_its_base_changes_numbers(causal: Path, tmp_path: Path) -> None:
    shutil.copytree(causal, tmp_path / "merged")
    merged = tmp_path / "merged"
    assert codes(merged, base=str(causal)) == {}
    assert codes(merged, base=str(causal), deep=True) == {"merged-equals-base": "changes-numbers"}
    tensors = load_file(merged / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.weight"][0, 0] += 1
    save_file(tensors, merged / "model.safetensors", metadata={"format": "pt"})
    assert codes(merged, base=str(causal), deep=True) == {}
    assert codes(causal, base=str(causal), deep=True) == {}
