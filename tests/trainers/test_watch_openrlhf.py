"""`watch` beside OpenRLHF's own saver under ZeRO-3: each save is judged once, over a kill and a restart."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from matrix import installed_here, python_of

from places import REPOSITORY
from watching import judged_over_a_kill

pytestmark = pytest.mark.trainer


@pytest.mark.parametrize("notify", ["poll", "inotify"])
def test_each_save_of_openrlhf_is_judged_once_and_whole(notify: str, envs: Path, tmp_path: Path) -> None:
    python = python_of(envs, "openrlhf-zero")
    if not python.exists():
        pytest.skip("openrlhf-zero is not built")
    run = tmp_path / "run"
    run.mkdir()
    known = {"PYTHONPATH": installed_here(tmp_path / "installed")}
    saver = REPOSITORY / "tests" / "runs" / "zero" / "openrlhf_saver.py"
    with subprocess.Popen([python, saver, tmp_path, "whole"], env=os.environ | known) as writer:
        told = judged_over_a_kill(run, tmp_path / "state.json", writer, notify)
    assert writer.returncode == 0
    assert told == [(f"step-{step}", "sound") for step in range(1, 5)]
