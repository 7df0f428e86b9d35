"""Runs that were split by experts, layers or within tensors, for other data-parallel ranks: what lived, bit by bit.

Oracles: what lived when real DeepSpeed saved the stored runs, and DeepSpeed's own files read by torch itself.
`tests/runs/run_split_reshard.py` lets real DeepSpeed load what is written.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from converter.core.writer.write import write
from converter.errors import ConvertError
from converter.recipe.verbs.doctor import doctor
from converter.recipe.verbs.reshard_state import ReshardRequest, plan_state
from converter.sources.deepspeed.source import SOURCE
from converter.sources.resharded import Resharded
from durability import Quiet, fast_folder
from saved_trees import differences as tree_differences
from saved_trees import loaded
from zero.compare import RUNS, STATES, differences, evaluated, live

SPLIT = RUNS.parent / "split_runs"
TAG = "global_step2"
CASES = {
    "tp-z1-n2": 6,
    "tp-qwen2-z1-n2": 4,
    "pipe-z1-n2": 4,
    "pipe-llama-z1-n2": 6,
    "moe-z1-n4": 2,
    "moe-data-first-z2-n4": 6,
    "moe-mixed-z2-n2": 4,
    "autoep-fp32-z2-n2": 6,
}


@pytest.fixture
def place() -> Iterator[Path]:
    with fast_folder() as folder:
        yield folder


def planned(run: Path, ranks: int | None, **more: Any) -> Resharded:
    return plan_state(ReshardRequest(str(run), ranks, **more), revision=None, token=None, keep_code=False)


def written(run: Path, out: Path, ranks: int) -> Path:
    write(planned(run, ranks).plan, out, reporter=Quiet())
    return out


def refused(run: Path, ranks: int | None, code: str, **more: Any) -> ConvertError:
    with pytest.raises(ConvertError) as caught:
        planned(run, ranks, **more)
    assert caught.value.code == code, caught.value
    return caught.value


@pytest.mark.parametrize("name", CASES)
def test_other_ranks_hold_what_lived(name: str, place: Path) -> None:
    out = written(SPLIT / name, place / "out", CASES[name])
    assert differences(evaluated(SOURCE.open(out, asked=name).tensors), live(SPLIT / name)) == []
    masters = SOURCE.open_masters(out, asked=name)
    trained = (masters.trained or frozenset()) - {n for group in masters.ties for n in group[1:]}
    assert trained
    for kind in STATES:
        which: Any = kind
        made = {n: masters.tensors[n] for n in trained} if kind == "master" else SOURCE.adam_moments(out, which=which)
        assert differences(evaluated(made), live(SPLIT / name, kind)) == [], kind


@pytest.mark.parametrize("name", CASES)
def test_the_same_ranks_again_have_deepspeeds_own_files(name: str, place: Path) -> None:
    ranks = int(name[-1])
    back = written(written(SPLIT / name, place / "other", CASES[name]), place / "back", ranks) / TAG
    own = SPLIT / name / TAG
    assert sorted(p.name for p in back.iterdir()) == sorted(p.name for p in own.iterdir())
    for file in own.iterdir():
        assert list(tree_differences(loaded(file), loaded(back / file.name))) == [], file.name


@pytest.mark.parametrize(
    ("name", "ranks", "what"),
    [
        ("tp-z1-n2", 3, "3 ranks can't be dealt out to 2 tensor-parallel ranks"),
        ("pipe-z1-n2", 1, "1 ranks can't be dealt out to 2 stages of a pipeline"),
        ("moe-z1-n4", 3, "3 ranks can't be dealt out to 2 sets of experts"),
    ],
)
def test_ranks_that_the_parts_cannot_share_are_refused(name: str, ranks: int, what: str) -> None:
    error = refused(SPLIT / name, ranks, "usage")
    assert what in error.what
    assert error.expected == "a multiple of 2"


@pytest.mark.parametrize(("name", "code"), [("tp-z1-n2", "zero-tensor-parallel"), ("pipe-z1-n2", "zero-pipeline"),
                                            ("moe-z1-n4", "zero-experts")])  # fmt: skip
@pytest.mark.parametrize("asked", [{"stage": 2}, {"stage": 3}, {"to": "universal"}])
def test_another_form_is_refused_with_what_can_be_done(name: str, code: str, asked: dict[str, Any]) -> None:
    error = refused(SPLIT / name, None, code, **asked)
    assert "--world-size alone" in str(error.next)


def test_experts_under_zero_3_are_refused() -> None:
    assert "under ZeRO-3" in refused(SPLIT / "autoep-mixtral-z3-n2", 4, "zero-experts").what


@pytest.mark.parametrize(
    ("name", "file", "code"),
    [
        ("tp-z1-n2", "mp_rank_01_model_states.pt", "zero-model-file"),
        ("tp-z1-n2", "bf16_zero_pp_rank_0_mp_rank_01_optim_states.pt", "zero-no-masters"),
        ("pipe-z1-n2", "layer_03-model_states.pt", "zero-pipeline"),
        ("moe-z1-n4", "layer_0_expert_2_mp_rank_00_model_states.pt", "zero-experts"),
        ("moe-z1-n4", "bf16_zero_pp_rank_3_mp_rank_00_optim_states.pt", "zero-rank-missing"),
    ],
)
def test_a_missing_file_is_named(name: str, file: str, code: str, place: Path) -> None:
    run = Path(shutil.copytree(SPLIT / name, place / name))
    (run / TAG / file).unlink()
    refused(run, 4, code)


def test_a_pipeline_of_tensor_parallel_ranks_is_refused(place: Path) -> None:
    run = Path(shutil.copytree(SPLIT / "pipe-z1-n2", place / "run"))
    for file in list((run / TAG).glob("layer_*-model_states.pt")):
        number = file.name.removeprefix("layer_").removesuffix("-model_states.pt")
        shutil.copy(file, file.with_name(f"layer_{number}-model_00-model_states.pt"))
        file.rename(file.with_name(f"layer_{number}-model_01-model_states.pt"))
    assert "2 tensor-parallel ranks" in refused(run, 4, "zero-pipeline").what


def test_a_part_that_is_missing_is_named(place: Path) -> None:
    run = Path(shutil.copytree(SPLIT / "tp-z1-n2", place / "run"))
    for file in (run / TAG).glob("*mp_rank_01*"):
        file.unlink()
    assert "mp_rank_01" in refused(run, 4, "zero-tensor-parallel").what


@pytest.mark.parametrize(("name", "ranks"), [("tp-z1-n2", 4), ("pipe-z1-n2", 4), ("moe-z1-n4", 2)])
def test_the_doctor_prints_the_command(name: str, ranks: int) -> None:
    found = [f for f in doctor(str(SPLIT / name), resume_on=ranks).findings if f.code == "resume-on"]
    assert [(f.severity, getattr(f.next, "verb", None)) for f in found] == [("changes-numbers", "reshard")]
