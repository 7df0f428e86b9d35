"""`diff --optimizer`: Adam's moments of two runs, by parameter, whatever the ranks that hold them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from converter.errors import ConvertError
from converter.recipe.verbs.diff import diff
from converter.recipe.verbs.reshard_state import reshard_state
from shards import edit
from zero.compare import RUNS


def test_a_run_on_other_ranks_has_the_same_moments(tmp_path: Path) -> None:
    reshard_state(RUNS / "lora-z3-n2", tmp_path / "on-3", world_size=3)
    done = diff(RUNS / "lora-z3-n2", tmp_path / "on-3", optimizer=True)
    assert done.is_equal
    assert len(done.pairs) == 2 * 9


def test_one_changed_moment_is_the_only_difference(tmp_path: Path) -> None:
    run = Path(shutil.copytree(RUNS / "lora-z3-n2", tmp_path / "run"))

    def change(state: Any) -> None:
        state["optimizer_state_dict"]["optimizer_state_dict"]["state"][0]["exp_avg_sq"][0] += 1

    edit(next((run / "global_step2").glob("*rank_0*optim_states.pt")), change)
    changed = [p for p in diff(RUNS / "lora-z3-n2", run, optimizer=True).pairs if p.status != "equal"]
    assert [(p.a.partition("/")[0], p.differing) for p in changed] == [("exp_avg_sq", 1)]


def test_a_folder_without_a_run_is_an_error_of_usage(tmp_path: Path) -> None:
    with pytest.raises(ConvertError):
        diff(tmp_path, RUNS / "lora-z3-n2", optimizer=True)
