"""Lines of docs/commands.md that run the program without an install; a wheel of this tree stands for a release."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from converter.shipped import shipped

ROOT = Path(__file__).resolve().parents[2]
BASE = shipped("fixtures") / "tiny-qwen2-base"

RUNNERS = {
    "pipx": ["pipx", "run", f"--pip-args=-c {ROOT / 'constraints.txt'}", "--spec"],
    "uvx": ["uvx", "--constraints", str(ROOT / "constraints.txt"), "--from"],
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    line = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(out), str(ROOT)]
    subprocess.run(line, check=True)
    (made,) = out.glob("*.whl")
    return made


@pytest.mark.slow
@pytest.mark.parametrize("runner", sorted(RUNNERS))
def test_a_runner_makes_an_environment_and_runs_doctor_in_it(runner: str, wheel: Path, tmp_path: Path) -> None:
    line = RUNNERS[runner]
    if shutil.which(line[0]) is None:
        pytest.skip(f"no {line[0]} on the PATH")
    homes = {name: str(tmp_path / name.lower()) for name in ("PIPX_HOME", "UV_TOOL_DIR", "UV_CACHE_DIR")}
    done = subprocess.run(
        [*line, str(wheel), "rlhf-convert", "doctor", str(BASE)],
        cwd=tmp_path,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | homes,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "no finding" in done.stdout
