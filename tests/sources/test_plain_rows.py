"""Ranks that saved plain rows under verl's names: put together where they are the model together, else refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from converter.cli import main
from small_families import CONFIGS, tiny


def saved_by(folder: Path, family: str, world: int, *, norms: bool = True) -> Any:
    """A model whose every rank saved its own rows, as `torch.chunk` cuts them; the live model."""
    torch.manual_seed(0)
    model = tiny(family)
    (folder / "huggingface").mkdir(parents=True)
    model.config.save_pretrained(folder / "huggingface")
    for rank in range(world):
        torch.save({n: cut(n, t, rank, world, norms) for n, t in model.state_dict().items()}, file(folder, world, rank))
    return model


def cut(name: str, tensor: torch.Tensor, rank: int, world: int, norms: bool) -> torch.Tensor:
    if tensor.dim() == 1 and not norms:
        return tensor.clone()
    pieces = tensor.chunk(world)
    return pieces[rank].clone() if rank < len(pieces) else tensor[:0].clone()


def file(folder: Path, world: int, rank: int) -> Path:
    return folder / f"model_world_size_{world}_rank_{rank}.pt"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("world", [2, 3, 5])
def test_rows_of_all_ranks_are_the_live_model(family: str, world: int, tmp_path: Path) -> None:
    live = saved_by(tmp_path / "run", family, world)
    assert main(["gather", str(tmp_path / "run"), str(tmp_path / "out"), "-q"]) == 0
    made, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values())
    for name, tensor in live.state_dict().items():
        assert torch.equal(made.state_dict()[name], tensor), name


@pytest.mark.parametrize("rank", [0, 1])
def test_a_missing_rank_is_named(rank: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved_by(tmp_path / "run", "llama", 2)
    file(tmp_path / "run", 2, rank).unlink()
    assert main(["gather", str(tmp_path / "run"), str(tmp_path / "out")]) == 3
    said = capsys.readouterr().err
    assert "REFUSED verl-rank-missing" in said
    assert f"rank {rank} of 2" in said
    assert not (tmp_path / "out").exists()


def test_rows_that_are_not_the_model_together_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved_by(tmp_path / "run", "llama", 2)
    state = torch.load(file(tmp_path / "run", 2, 1))  # noqa: TID251
    name = "model.layers.1.mlp.up_proj.weight"
    torch.save(state | {name: state[name][:-1].clone()}, file(tmp_path / "run", 2, 1))
    assert main(["gather", str(tmp_path / "run"), str(tmp_path / "out")]) == 3
    said = capsys.readouterr().err
    assert "REFUSED verl-sizes" in said
    assert name in said


def test_slices_of_tensor_parallelism_are_called_that(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved_by(tmp_path / "run", "llama", 2, norms=False)
    assert main(["gather", str(tmp_path / "run"), str(tmp_path / "out")]) == 3
    said = capsys.readouterr().err
    assert "REFUSED verl-placement" in said
    assert "tensor-parallel" in said


def test_equal_rows_are_no_copies_of_the_whole(tmp_path: Path) -> None:
    """Norms of ones are the same on every rank, and still halves."""
    live = saved_by(tmp_path / "run", "llama", 2)
    assert torch.equal(live.model.norm.weight, torch.ones(16))
    assert main(["gather", str(tmp_path / "run"), str(tmp_path / "out"), "-q"]) == 0
    made = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert made.model.norm.weight.shape == (16,)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_whole_copies_on_every_rank_are_one_model(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = tiny(family)
    (tmp_path / "run" / "huggingface").mkdir(parents=True)
    model.config.save_pretrained(tmp_path / "run" / "huggingface")
    for rank in range(2):
        torch.save(model.state_dict(), file(tmp_path / "run", 2, rank))
    assert main(["gather", str(tmp_path / "run"), str(tmp_path / "out"), "-q"]) == 0
    made = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(made.state_dict()[n], t) for n, t in model.state_dict().items())
