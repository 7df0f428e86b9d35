"""`watch --keep-sole-copies`: which folders must not be rotated away, over restarts and rotation."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import converter
from converter.cli import main
from places import REPOSITORY
from schemas import faults_of

BASE = REPOSITORY / "fixtures" / "tiny-qwen2-base"
BROKEN = REPOSITORY / "fixtures" / "tiny-reward-run" / "checkpoint-4"


def watch(run: str | Path, state: Path, *more: str) -> int:
    timing = ["--once", "--interval", "0.05", "--settle", "0.15", "--state", str(state), "--keep-sole-copies"]
    return main(["watch", str(run), *timing, *more])


def sound(run: Path, step: int) -> Path:
    return Path(shutil.copytree(BASE, run / f"checkpoint-{step}"))


def lost(run: Path, step: int) -> Path:
    """A checkpoint of which a tensor is empty, and nothing beside it has it."""
    folder = sound(run, step)
    name = "model.layers.0.self_attn.q_proj.weight"
    file, tensors = next((f, t) for f in folder.glob("*.safetensors") if name in (t := load_file(f)))
    save_file({**tensors, name: tensors[name][:0, 0]}, file, {"format": "pt"})
    return folder


def kept(out: str) -> list[list[Any]]:
    """Names and reasons of each object that says what has to stay."""
    told = [json.loads(line) for line in out.splitlines()]
    assert [fault for each in told for fault in faults_of("watch", each)] == []
    return [[(Path(k["path"]).name, k["why"]) for k in each["keep"]] for each in told if "keep" in each]


def test_shards_that_hold_what_the_model_beside_them_lacks_have_to_stay(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(BROKEN, run / "checkpoint-4")
    assert watch(run, tmp_path / "state") == 1
    told = capsys.readouterr().out.splitlines()
    assert told[1:] == [f"keep {run}/checkpoint-4/global_step4: perhaps the sole copy of what checkpoint-4 lacks"]
    sound(run, 5)
    assert watch(run, tmp_path / "state", "--json") == 0
    always = ("global_step4", "perhaps the sole copy of what checkpoint-4 lacks")
    assert kept(capsys.readouterr().out) == [[always]]  # a newer sound one does not hold step 4
    shutil.rmtree(run / "checkpoint-4")
    assert watch(run, tmp_path / "state", "--json") == 0
    assert kept(capsys.readouterr().out) == [[]]


def test_the_last_checkpoint_that_can_be_used_stays_until_a_newer_one_can(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, state = tmp_path / "run", tmp_path / "state"
    for step in (9, 10):
        sound(run, step)
    assert watch(run, state, "--json") == 0
    assert kept(capsys.readouterr().out) == [[]]
    lost(run, 11)
    lost(run, 100)
    assert watch(run, state, "--json") == 1
    why = "the newest checkpoint that can be used; checkpoint-{} lost weights".format
    assert kept(capsys.readouterr().out) == [[("checkpoint-10", why(11))], [("checkpoint-10", why(100))]]
    assert watch(run, state, "--json") == 0  # a restart says it again, and examines nothing again
    assert kept(capsys.readouterr().out) == [[("checkpoint-10", why(100))]]
    sound(run, 101)
    assert watch(run, state) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0] == f"keep {run}/checkpoint-10: {why(100)}"
    assert told[2:] == ["keep: no folder is known that has to stay, but the newest checkpoint"]


def test_a_checkpoint_that_shards_restore_is_one_that_can_be_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    sound(run, 3)
    shutil.copytree(BROKEN, run / "checkpoint-4")
    lost(run, 5)
    assert watch(run, tmp_path / "state", "--json") == 1
    assert [name for name, _ in kept(capsys.readouterr().out)[-1]] == ["global_step4", "checkpoint-4"]


def test_what_has_to_stay_is_named_as_the_run_is_named_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(BROKEN, tmp_path / "run" / "checkpoint-4")
    monkeypatch.chdir(tmp_path)
    assert watch("run", tmp_path / "state") == 1
    monkeypatch.chdir(tmp_path / "run")
    capsys.readouterr()
    assert watch(".", tmp_path / "state") == 0
    assert capsys.readouterr().out.startswith("keep checkpoint-4/global_step4: ")


def test_without_the_option_nothing_is_said_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(BROKEN, tmp_path / "run" / "checkpoint-4")
    watching = converter.watch(tmp_path / "run", once=True, interval=0.05, settle=0.15, state=tmp_path / "state")
    assert [Path(each.path).name for each in watching] == ["checkpoint-4"]
    assert [Path(k.path).name for k in watching.keep] == ["global_step4"]
    timing = ["--once", "--interval", "0.05", "--settle", "0.15", "--state", str(tmp_path / "other")]
    assert main(["watch", str(tmp_path / "run"), *timing]) == 1
    assert "keep" not in capsys.readouterr().out
