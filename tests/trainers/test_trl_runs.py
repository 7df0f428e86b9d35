"""Runs' folders as TRL's own trainers leave them have no finding above cosmetic."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from matrix import environment, python_of

from converter.examine.doctor import DoctorRequest, examine

pytestmark = pytest.mark.trainer

RUNS = ("reward", "reward-lora", "sft", "sft-lora", "dpo", "dpo-lora")


@pytest.fixture(scope="module")
def runs(envs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out, python = tmp_path_factory.mktemp("trl"), python_of(envs, "trl")
    if not python.exists():
        pytest.skip("trl is not built")
    subprocess.run(
        [python, Path(__file__).with_name("run_trl.py"), out], env=environment(out), check=True, capture_output=True
    )
    return out


@pytest.mark.parametrize("run", RUNS)
def test_a_run_of_trl_is_healthy(runs: Path, run: str) -> None:
    for place in (runs / run, runs / run / "checkpoint-1", runs / run / "checkpoint-2"):
        findings = examine(DoctorRequest(str(place), deep=True)).findings
        assert [f.code for f in findings if f.severity != "cosmetic"] == []
        # TRL itself leaves the head of a reward adapter out under the transformers of its environment, 5.15.
        expected = ["loader-random"] if run == "reward-lora" else []
        findings = examine(DoctorRequest(str(place), target="trl")).findings
        assert [f.code for f in findings if f.severity != "cosmetic"] == expected
