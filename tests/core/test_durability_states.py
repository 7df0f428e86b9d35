"""A trainer's state for other ranks is as safe as a model: whatever call fails, whatever a power cut leaves."""

from __future__ import annotations

import dataclasses
import errno
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from converter.core.writer.write import write
from converter.recipe.verbs.reshard_state import ReshardRequest, plan_state
from durability import Quiet, fast_folder, tree
from faulty_runs import Merge, fail_at_intervals, fresh, overwriting, replay, resumed
from zero.compare import RUNS


@dataclasses.dataclass(frozen=True)
class Resharding(Merge):
    """A run on three ranks, for two; the other plan is for one."""

    def inputs_are_untouched(self) -> bool:
        return {"run": tree(self.folder / "run")} == self.inputs


@pytest.fixture(scope="module")
def merge() -> Iterator[Merge]:
    with fast_folder() as folder:
        run = folder / "run"
        shutil.copytree(RUNS / "subgroups-z3-n3", run)
        plans = [
            plan_state(ReshardRequest(str(run), ranks), revision=None, token=None, keep_code=False).plan
            for ranks in (2, 1)
        ]
        inputs = {"run": tree(run)}
        write(plans[0], folder / "whole", reporter=Quiet())
        write(plans[1], folder / "former", reporter=Quiet())
        write(plans[0], folder / "unchecked", reporter=Quiet(), verify=False)
        trees = [tree(folder / name) for name in ("whole", "unchecked", "former")]
        yield Resharding(folder, *plans, inputs, *trees)


@pytest.mark.parametrize("scene", [fresh, resumed, overwriting])
def test_after_a_power_cut_out_is_absent_or_whole_and_the_next_run_finishes(
    merge: Merge, place: Any, scene: Any
) -> None:
    replay(merge, place, scene, most=15)


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC], ids=["EIO", "ENOSPC"])
def test_whatever_call_fails_out_is_absent_or_whole_and_the_next_run_finishes(
    merge: Merge, place: Any, number: int
) -> None:
    assert fail_at_intervals(merge, place, number, step=11) > 50, "the watch saw nothing"
