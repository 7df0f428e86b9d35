"""`verify` of a run's shards: they are no model, and the command that it prints makes one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from oracle.command import run
from places import RUNS


@pytest.mark.parametrize(
    "state", ["zero/runs/lm-tied-z3-n2", "mcore/runs/qwen2-tied-tp2-pp2", "mcore/runs/old-qwen2-tp2-pp2"]
)
def test_a_language_model_s_run_is_asked_for_no_head_and_leads_to_gather(
    state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(RUNS / state, "run")
    told = run("verify", "run")
    assert told.code == 4
    assert told.out.splitlines()[0].endswith("as actor")
    (step,) = [line.removeprefix("Next:").strip() for line in told.out.splitlines() if line.startswith("Next:")]
    assert step.startswith("rlhf-convert gather run")
    assert run(*step.split()[1:]).code == 0
