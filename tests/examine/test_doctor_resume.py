"""`doctor --resume-on M`: whether a run goes on with M ranks, and the command without which it doesn't."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import converter
from converter.cli import main
from converter.examine.diagnoses.case import Finding
from places import TESTS

RUNS = TESTS / "runs"
ZERO, VERL = RUNS / "zero" / "runs", RUNS / "verl_saves" / "runs"


def found(run: Path, ranks: int) -> Finding:
    report = converter.doctor(run, resume_on=ranks)
    return next(f for f in report.findings if f.code == "resume-on")


@pytest.mark.parametrize("run", [ZERO / "aligned-z1-n2", VERL / "lora-fsdp1-n2"])
def test_other_ranks_need_a_command_which_makes_them_go_on(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    other = found(copy, 3)
    assert (other.severity, other.recoverability) == ("changes-numbers", "here")
    assert "2 ranks saved the run" in other.text
    assert str(other.next) == f"rlhf-convert reshard {copy} {copy}-on-3 --world-size 3"
    assert main([*str(other.next).split()[1:], "-q"]) == 0
    assert (found(copy, 2).severity, found(Path(f"{copy}-on-3"), 3).severity) == ("cosmetic", "cosmetic")


@pytest.mark.parametrize("run", [RUNS / "dcp" / "runs" / "titan-n3", ZERO / "plain-z0-n1"])
def test_what_any_number_of_ranks_loads_is_said_to_be_that(run: Path) -> None:
    assert found(run, 7).severity == "cosmetic"
    assert "goes on with 7 ranks as it is" in found(run, 7).text


@pytest.mark.parametrize(
    ("run", "says"),
    [
        (VERL / "critic-hsdp-fsdp2-n4", "replicas of 2 shards"),
        (ZERO / "elastic-z2-n3", "elastic_checkpoint"),
        (TESTS.parent / "fixtures" / "tiny-qwen2-base", "no shards of a trainer"),
    ],
)
def test_what_can_not_go_on_is_an_error_with_its_reason(run: Path, says: str) -> None:
    assert found(run, 3).severity == "error"
    assert says in found(run, 3).text


def test_nothing_is_said_unless_it_is_asked() -> None:
    assert "resume-on" not in {f.code for f in converter.doctor(ZERO / "aligned-z1-n2").findings}


def test_a_trainers_flag_is_named(tmp_path: Path) -> None:
    run = Path(shutil.copytree(ZERO / "aligned-z1-n2", tmp_path / "checkpoint-2"))
    (run / "trainer_state.json").write_text('{"global_step": 2}')
    assert f"--resume_from_checkpoint {run}-on-4" in found(run, 4).text
