"""Memory of `gather`: its anonymous pages do not grow with the checkpoint. Time is for the benchmark to say."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from zero.large import Size, make

SMALL, LARGE = (Size(layers, hidden=512, inner=1408, vocab=4000) for layers in (3, 14))
COMMAND = [sys.executable, "-m", "converter", "gather", "run", "out", "-q", "-j", "2"]


def _peak(folder: Path, more: list[str]) -> int:
    """Peak of RssAnon of a gathering process, sampled every few milliseconds."""
    with (folder / "err").open("wb") as err:
        child = subprocess.Popen([*COMMAND, *more], cwd=folder, stderr=err)
    peak = 0
    while child.poll() is None:
        lines = Path(f"/proc/{child.pid}/status").read_text().splitlines()
        peak = max(peak, *(int(n.split()[1]) * 1024 for n in lines if n.startswith("RssAnon:")), 0)
        time.sleep(0.003)
    assert child.returncode == 0, (folder / "err").read_text()
    return peak


@pytest.mark.parametrize(("stage", "more"), [pytest.param(3, [], marks=pytest.mark.slow), (2, ["--master"])])
def test_anonymous_memory_stays_flat_for_a_checkpoint_four_times_as_large(
    tmp_path: Path, stage: int, more: list[str]
) -> None:
    assert LARGE.parameters > 3.9 * SMALL.parameters
    peaks = {}
    for name, size in (("small", SMALL), ("large", LARGE)):
        (tmp_path / name).mkdir()
        make(tmp_path / name / "run", size, stage)
        peaks[name] = _peak(tmp_path / name, more)
        receipt = json.loads((tmp_path / name / "out" / "rlhf-convert.json").read_text())
        assert sum(receipt["counts"].values()) == len(list(size.shapes()))
    assert peaks["small"] > 10e6, "nothing was sampled"
    assert peaks["large"] < 1.3 * peaks["small"], peaks
