"""`doctor --deep` of a training state: moments that are NaN, zero after the first step, or older than the weights."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from converter.recipe.verbs.doctor import doctor
from shards import edit
from zero.compare import RUNS


def codes(run: Path) -> dict[str, str]:
    report = doctor(run, deep=True)
    return {f.code: f.severity for f in report.findings if f.code.startswith("moments-")}


def changed(tmp_path: Path, change: Callable[[dict[str, Any]], None], pattern: str = "*optim_states.pt") -> Path:
    """A sound run with each optimizer file's states changed."""
    run = Path(shutil.copytree(RUNS / "lora-z3-n2", tmp_path / "run"))
    for path in (run / "global_step2").glob(pattern):
        edit(path, lambda s: change(s["optimizer_state_dict"]["optimizer_state_dict"]["state"]))
    return run


@pytest.mark.parametrize("name", ["lora-z3-n2", "reward-z2-n2", "elastic-z2-n3"])
def test_a_sound_run_has_no_finding_about_its_moments(name: str) -> None:
    assert codes(RUNS / name) == {}


def test_a_moment_that_is_nan_is_an_error(tmp_path: Path) -> None:
    run = changed(tmp_path, lambda s: s[0]["exp_avg"].__setitem__(0, float("nan")), "*rank_1*optim_states.pt")
    assert codes(run) == {"moments-nonfinite": "error"}


def test_moments_that_are_all_zero_after_the_first_step_change_numbers(tmp_path: Path) -> None:
    run = changed(tmp_path, lambda s: [g["exp_avg_sq"].zero_() for g in s.values()] and None)
    assert codes(run) == {"moments-zero": "changes-numbers"}


def test_an_optimizer_that_began_anew_is_older_than_the_weights(tmp_path: Path) -> None:
    def anew(state: dict[str, Any]) -> None:
        for group in state.values():
            group["step"] = torch.tensor(1.0)

    assert codes(changed(tmp_path, anew)) == {"moments-older": "changes-numbers"}


def test_steps_that_were_skipped_are_not_missing(tmp_path: Path) -> None:
    run = Path(shutil.copytree(RUNS / "lora-z3-n2", tmp_path / "run"))
    for path in (run / "global_step2").glob("*model_states.pt"):
        edit(path, lambda s: s.update(global_steps=5, skipped_steps=3))
    assert codes(run) == {}
