"""OpenRLHF's PPO keeps `_actor` and `_critic` side by side: recognised from above, one chosen by `--part`."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from converter.cli import main
from places import RUNS

SAVED = {"_actor": "lm-tied-z3-n2", "_critic": "reward-z2-n2"}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run as OpenRLHF lays it out, of states that DeepSpeed saved."""
    for folder, name in SAVED.items():
        shutil.copytree(RUNS / "zero" / "runs" / name, tmp_path / "ckpt" / folder)
        (tmp_path / "ckpt" / folder / "oracle.safetensors").unlink()
    return tmp_path / "ckpt"


def live(folder: str) -> dict[str, torch.Tensor]:
    oracle = load_file(RUNS / "zero" / "runs" / SAVED[folder] / "oracle.safetensors")
    return {n.removeprefix("live/"): t for n, t in oracle.items() if n.startswith("live/")}


@pytest.mark.parametrize(("part", "folder"), [("actor", "_actor"), ("critic", "_critic"), ("value", "_critic")])
def test_the_part_that_is_named_is_gathered(part: str, folder: str, run: Path, tmp_path: Path) -> None:
    assert main(["gather", str(run), str(tmp_path / "out"), "--part", part, "-q"]) == 0
    made, wanted = load_file(tmp_path / "out" / "model.safetensors"), live(folder)
    assert made
    for name, tensor in made.items():
        assert torch.equal(tensor, wanted[name]), name


def test_without_a_part_both_are_offered(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gather", str(run), str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "ERROR several-parts" in said
    assert "expected --part with one of actor, critic" in said
    assert f"Next:    rlhf-convert gather {run} {tmp_path / 'out'} --part actor" in said


def test_one_that_is_alone_is_meant(run: Path, tmp_path: Path) -> None:
    shutil.rmtree(run / "_actor")
    assert main(["gather", str(run), str(tmp_path / "out"), "-q"]) == 0
    assert load_file(tmp_path / "out" / "model.safetensors").keys() <= live("_critic").keys()


def test_a_part_that_is_not_there_is_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(run / "_critic")
    assert main(["gather", str(run), str(tmp_path / "out"), "--part", "critic"]) == 2
    assert "ERROR no-such-part" in capsys.readouterr().err


def test_a_state_of_one_model_has_no_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = RUNS / "zero" / "runs" / "lm-tied-z3-n2"
    assert main(["gather", str(one), str(tmp_path / "out"), "--part", "actor"]) == 2
    assert "ERROR no-parts" in capsys.readouterr().err
