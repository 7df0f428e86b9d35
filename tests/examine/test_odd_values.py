"""`doctor --deep`: a matrix of one number, and one whose scale is far off its siblings'; trained ones are neither."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from converter.diagnostic import Diagnostic
from converter.examine.doctor import DoctorRequest, examine
from healthy.models import Saved
from oracle.bases import read_tensors, write_tensors

FAMILIES = {
    "llama": "model.layers.{}.mlp.up_proj.weight",
    "gpt_neox": "gpt_neox.layers.{}.attention.dense.weight",
    "gpt2": "transformer.h.{}.attn.c_attn.weight",
    "qwen3_moe": "model.layers.{}.mlp.experts.1.down_proj.weight",
}


def found_in(folder: Path) -> list[Diagnostic]:
    return [f for f in examine(DoctorRequest(str(folder), deep=True)).findings if f.code == "suspicious-values"]


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_matrix_of_one_number_is_named_with_it(kind: str, tmp_path: Path) -> None:
    folder = Saved("causal", kind).write(tmp_path / "model")
    assert found_in(folder) == []
    tensors, name = read_tensors(folder), FAMILIES[kind].format(1)
    write_tensors(folder, {**tensors, name: torch.full_like(tensors[name], 0.25)})
    (found,) = found_in(folder)
    assert (found.severity, found.tensors) == ("changes-numbers", (name,))
    assert found.evidence == (f"{name} is 0.25",)


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("layer", [0, 1])
def test_a_matrix_ten_thousand_times_as_large_as_its_siblings_is_named(kind: str, layer: int, tmp_path: Path) -> None:
    folder = Saved("causal", kind).write(tmp_path / "model")
    tensors, name = read_tensors(folder), FAMILIES[kind].format(layer)
    write_tensors(folder, {**tensors, name: tensors[name] * 1e4})
    (found,) = found_in(folder)
    assert (found.severity, found.tensors) == ("changes-numbers", (name,))
    scale = float(tensors[name].square().mean().sqrt()) * 1e4
    assert float(found.evidence[0].rpartition(" ")[2]) == pytest.approx(scale, rel=0.01)


def test_one_ten_thousand_times_as_small_is_a_hint(tmp_path: Path) -> None:
    """Layers that were put between others begin at zero."""
    folder = Saved("causal", "llama").write(tmp_path / "model")
    tensors, name = read_tensors(folder), FAMILIES["llama"].format(1)
    write_tensors(folder, {**tensors, name: tensors[name] * 1e-4})
    (found,) = found_in(folder)
    assert (found.severity, found.tensors) == ("cosmetic", (name,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_read_too(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = Saved("causal", "llama").write(tmp_path / "model")
    tensors, name = {n: t.to(dtype) for n, t in read_tensors(folder).items()}, FAMILIES["llama"].format(0)
    write_tensors(folder, tensors)
    assert found_in(folder) == []
    write_tensors(folder, {**tensors, name: torch.full_like(tensors[name], 3)})
    assert [f.tensors for f in found_in(folder)] == [(name,)]
