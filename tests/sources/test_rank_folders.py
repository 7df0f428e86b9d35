"""Ranks that each saved their own slices as a folder: put together where they are the model together, else refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from converter.cli import main
from converter.examine.doctor import DoctorRequest, examine
from healthy.models import Saved
from oracle.bases import read_tensors, write_tensors

Tensors = dict[str, torch.Tensor]
ACROSS = ("o_proj.weight", "down_proj.weight")
"""Row-parallel layers: DeepSpeed's AutoTP cuts their columns."""
KINDS = ("llama", "qwen3", "mistral")


def tensor_parallel(tensors: Tensors, rank: int, world: int) -> Tensors:
    """As AutoTP cuts: projections, not embeddings and norms."""

    def cut(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dim() == 1 or ".layers." not in name:
            return tensor
        return tensor.chunk(world, 1 if name.endswith(ACROSS) else 0)[rank].clone()

    return {n: cut(n, t) for n, t in tensors.items()}


def by_rows(tensors: Tensors, rank: int, world: int) -> Tensors:
    """As FSDP cuts: rows of everything."""
    return {n: t.chunk(world)[rank].clone() for n, t in tensors.items()}


def saved_by_ranks(root: Path, kind: str, cut: object, world: int = 2) -> Tensors:
    """A run with a folder a rank; the whole model's tensors."""
    whole = Saved("causal", kind, more=(("tie_word_embeddings", False),)).write(root / "whole")
    tensors = read_tensors(whole)
    for rank in range(world):
        folder = root / "run" / f"rank_{rank}"
        shutil.copytree(whole, folder)
        write_tensors(folder, cut(tensors, rank, world))  # type: ignore[operator]
    return tensors


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cut", [tensor_parallel, by_rows])
def test_the_slices_of_all_ranks_are_the_model(kind: str, cut: object, tmp_path: Path) -> None:
    tensors = saved_by_ranks(tmp_path, kind, cut)
    assert main(["gather", str(tmp_path / "run"), str(tmp_path / "out"), "-q"]) == 0
    made = read_tensors(tmp_path / "out")
    assert made.keys() == tensors.keys()
    assert all(torch.equal(made[n], t) for n, t in tensors.items())


def test_doctor_says_which_rank_it_is_and_how_all_are_put_together(tmp_path: Path) -> None:
    saved_by_ranks(tmp_path, "llama", tensor_parallel)
    (found,) = [f for f in examine(DoctorRequest(str(tmp_path / "run" / "rank_1"))).findings if f.severity == "error"]
    assert "rank 1 of 2 (tensor-parallel)" in found.text
    assert str(found.next) == f"rlhf-convert gather {tmp_path / 'run'} {tmp_path / 'run'}-gathered"


def test_a_rank_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved_by_ranks(tmp_path, "llama", by_rows, world=3)
    shutil.rmtree(tmp_path / "run" / "rank_1")
    assert main(["gather", str(tmp_path / "run"), str(tmp_path / "out")]) == 3
    said = capsys.readouterr().err
    assert "REFUSED rank-folders" in said and "rank 1 of at least 3" in said
    assert not (tmp_path / "out").exists()


def test_rows_of_fused_matrices_are_put_together_where_fsdp_cut_them(tmp_path: Path) -> None:
    tensors = saved_by_ranks(tmp_path, "phi3", by_rows)
    assert main(["gather", str(tmp_path / "run"), str(tmp_path / "out"), "-q"]) == 0
    assert all(torch.equal(t, tensors[n]) for n, t in read_tensors(tmp_path / "out").items())


def test_fused_matrices_of_tensor_parallelism_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved_by_ranks(tmp_path, "phi3", tensor_parallel)
    assert main(["gather", str(tmp_path / "run"), str(tmp_path / "out")]) == 3
    assert "no file says in what order" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("harm", ["a row less", "another norm"])
def test_slices_of_two_saves_are_refused(harm: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved_by_ranks(tmp_path, "llama", tensor_parallel)
    folder, name = tmp_path / "run" / "rank_1", "model.layers.1.mlp.up_proj.weight"
    tensors = read_tensors(folder)
    if harm == "a row less":
        tensors[name] = tensors[name][:-1].clone()
    else:
        name = "model.norm.weight"
        tensors[name] = tensors[name] + 1
    write_tensors(folder, tensors)
    assert main(["gather", str(tmp_path / "run"), str(tmp_path / "out")]) == 3
    assert name in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_models_of_the_same_size_in_folders_of_ranks_are_not_slices(tmp_path: Path) -> None:
    """Every rank saved the whole model: it is there once."""
    tensors = saved_by_ranks(tmp_path, "llama", lambda tensors, rank, world: tensors)
    assert main(["gather", str(tmp_path / "run"), str(tmp_path / "out"), "-q"]) == 0
    assert all(torch.equal(t, tensors[n]) for n, t in read_tensors(tmp_path / "out").items())
