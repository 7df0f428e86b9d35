"""Mutated headers, indexes, configs, recipes and logs through the command line: done or refused, cleanly and soon."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from places import IMPORTED, TESTS

SECONDS = float(os.environ.get("FUZZ_SECONDS", "2"))
LONG = 600.0
CASES = 120
"""At least; a busy machine takes longer for them."""


def _fuzzed(scratch: Path, seconds: float, seed: int) -> dict[str, int]:
    program = [sys.executable, str(TESTS / "fuzz" / "fuzz_texts.py"), str(scratch)]
    command = [*program, "--seconds", str(seconds), "--cases", str(CASES), "--seed", str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300 + 2 * seconds)
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout)
    assert said["slowest"] < 20
    ended: dict[str, int] = said["ended"]
    return ended | {"cases": said["cases"]}


def test_mutated_texts_are_done_or_refused(tmp_path: Path) -> None:
    ended = _fuzzed(tmp_path, SECONDS, 2026)
    # That it gets past the first check of each kind of file, and is not refused for one reason only.
    assert ended["cases"] >= CASES
    for kind, code in (("config", 0), ("header", 3), ("index", 3), ("log", 0), ("recipe", 2), ("adapter", 3)):
        assert ended[f"{kind} exit {code}"] > 0, ended


@pytest.mark.slow
def test_mutated_texts_are_done_or_refused_for_long(tmp_path: Path) -> None:
    assert _fuzzed(tmp_path, LONG, int.from_bytes(os.urandom(4), "little"))["cases"] > 1000


def test_a_case_is_repeated_from_its_number_and_a_fault_of_ours_is_seen(tmp_path: Path) -> None:
    broken = (
        "import sys, fuzz_texts\nfuzz_texts.command = lambda argv: print('\\x1b[2J') or 0\nsys.exit(fuzz_texts.main())"
    )
    places = {"PYTHONPATH": os.pathsep.join(map(str, IMPORTED))}
    command = [sys.executable, "-c", broken, str(tmp_path), "--only", "7"]
    done = subprocess.run(command, env=os.environ | places, capture_output=True, text=True, check=False)
    assert (done.returncode, "case 7 of seed 0" in done.stderr) == (1, True), done.stderr
