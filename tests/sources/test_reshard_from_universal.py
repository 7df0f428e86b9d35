"""A universal checkpoint of DeepSpeed cut for ranks again: the files that the run had, as torch itself reads them.

Oracles: DeepSpeed's own rank files of the run that a universal checkpoint was made from, by ds_to_universal.py itself
(`universal_runs`) or by `reshard --to universal`.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from converter.core.writer.write import write
from converter.errors import ConvertError
from converter.recipe.verbs.reshard_state import ReshardRequest, plan_state
from durability import Quiet, fast_folder
from saved_trees import differences as tree_differences
from saved_trees import loaded
from shards import edit
from zero.compare import RUNS, faults

THEIRS = RUNS.parent / "universal_runs"


@pytest.fixture
def place() -> Iterator[Path]:
    with fast_folder() as folder:
        yield folder


def written(run: Path, out: Path, ranks: int | None, **asked: Any) -> Path:
    made = plan_state(ReshardRequest(str(run), ranks, **asked), revision=None, token=None, keep_code=False)
    write(made.plan, out, reporter=Quiet())
    return out


def refused(run: Path, code: str, **asked: Any) -> ConvertError:
    with pytest.raises(ConvertError) as caught:
        plan_state(ReshardRequest(str(run), 2, **asked), revision=None, token=None, keep_code=False)
    assert caught.value.code == code, caught.value
    return caught.value


def test_what_ds_to_universal_made_becomes_the_files_of_the_run(place: Path) -> None:
    out = written(THEIRS / "lora-z3-n2", place / "out", 2)
    own = RUNS / "lora-z3-n2" / "global_step2"
    for file in own.iterdir():
        assert list(tree_differences(loaded(file), loaded(out / own.name / file.name))) == [], file.name


@pytest.mark.parametrize("name", ["aligned-z1-n2", "lm-fp16-z1-n2", "reward-z2-n2", "lora-lean-z2-n2"])
def test_there_and_back_has_the_files_of_the_run(name: str, place: Path) -> None:
    out = written(written(RUNS / name, place / "universal", None, to="universal"), place / "out", 2)
    own = RUNS / name / "global_step2"
    assert sorted(p.name for p in own.iterdir()) == sorted(p.name for p in (out / own.name).iterdir())
    for file in own.iterdir():
        assert list(tree_differences(loaded(file), loaded(out / own.name / file.name))) == [], file.name


@pytest.mark.parametrize(("name", "ranks", "stage"), [
    ("lora-z3-n2", 3, None), ("lora-z3-n2", 1, 2), ("roundrobin-aligned-z2-n3", 2, None),
    ("roundrobin-aligned-z2-n3", 4, 3),
])  # fmt: skip
def test_other_ranks_and_stages_hold_what_lived(name: str, ranks: int, stage: int | None, place: Path) -> None:
    out = written(THEIRS / name, place / "out", ranks, stage=stage)
    for file in ("fixture.json", "oracle.safetensors"):
        shutil.copy(THEIRS / name / file, out)
    assert faults(out) == []


def test_a_scrambled_one_is_refused() -> None:
    assert "belong to others" in refused(THEIRS / "roundrobin-z2-n3", "zero-round-robin").what


def test_without_the_common_state_there_are_no_learning_rates(place: Path) -> None:
    run = Path(shutil.copytree(THEIRS / "lora-z3-n2", place / "run"))
    (run / "global_step2_universal" / "zero" / "optimizer_state.pt").unlink()
    assert "learning rates" in refused(run, "zero-malformed").what


def test_parameters_with_other_states_are_refused(place: Path) -> None:
    run = Path(shutil.copytree(THEIRS / "lora-z3-n2", place / "run"))
    folder = next((run / "global_step2_universal" / "zero").glob("*lora_A*"))
    (folder / "exp_avg_sq.pt").rename(folder / "momentum.pt")
    refused(run, "zero-optimizer-state")


def test_steps_that_differ_are_refused(place: Path) -> None:
    run = Path(shutil.copytree(THEIRS / "roundrobin-aligned-z2-n3", place / "run"))
    folder = run / "global_step2_universal" / "zero" / "first.bias"
    torch.save(torch.tensor(7.0), folder / "step.pt")
    assert "`step`" in refused(run, "zero-mixed").what


def test_a_name_that_leads_out_of_the_folder_is_refused(place: Path) -> None:
    run = Path(shutil.copytree(THEIRS / "roundrobin-aligned-z2-n3", place / "run"))
    edit(run / "global_step2_universal" / "mp_rank_00_model_states.pt", _renamed)
    assert "lacks" in refused(run, "zero-parameter-missing").what


def _renamed(state: Any) -> None:
    group = state["param_shapes"][0]
    name, shape = next(iter(group.items()))
    del group[name]
    group["../../../run/" + name] = shape
