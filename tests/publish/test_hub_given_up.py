"""A hub that answers every request with a fault is given up, by each verb that asks it, within a minute."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fake_hub import TOKEN, FakeHub, Fault, running
from hub_here import on_disk
from places import REPOSITORY

pytestmark = pytest.mark.slow

MODEL = REPOSITORY / "fixtures" / "tiny-qwen2-base"
ADAPTER = REPOSITORY / "fixtures" / "tiny-reward-adapter"
MANY = 10**6
HERE, THERE = str(MODEL), "hf://me/model"
VERBS = {
    "push": ("push", HERE, "me/model"),
    "write": ("reshard", HERE, THERE),
    "read": ("reshard", "org/model", "out"),
    "both": ("reshard", "org/model", THERE),
    "base": ("merge-lora", "org/adapter", "out", "--base", HERE),
    "adapter": ("merge-lora", str(ADAPTER), "out", "--base", "org/base"),
    "inspect": ("inspect", "org/model"),
    "doctor": ("doctor", "org/model"),
    "verify": ("verify", "org/model", "--for", "transformers"),
    "probe": ("verify", HERE, "--for", "transformers", "--probe", "hf://datasets/org/pairs"),
}


PARTS = {
    "uploads": ("push", "^PUT"),
    "uploads of an output": ("write", "^PUT"),
    "commits": ("push", "/commit/"),
    "commits of an output": ("write", "/commit/"),
    "files": ("read", "resolve/.*safetensors"),
    "files on the way through": ("both", "resolve/.*safetensors"),
}


def given_up(verb: str, fault: Fault, folder: Path) -> None:
    (folder / "work").mkdir()
    with running(FakeHub()) as hub:
        hub.add("org/model", on_disk(MODEL))
        env = {n: v for n, v in os.environ.items() if not n.startswith("HF_") and "proxy" not in n.lower()}
        env |= {**hub.environment(), "HF_TOKEN": TOKEN, "HF_HOME": str(folder / "home"), "TMPDIR": str(folder)}
        hub.faults = [fault]
        line = [sys.executable, "-m", "converter", *VERBS[verb]]
        began = time.monotonic()
        ran = subprocess.run(
            line, cwd=folder / "work", env=env, capture_output=True, text=True, check=False, timeout=120
        )
        took = time.monotonic() - began
    assert fault.count < MANY, "nothing was asked that failed"
    assert took < 60
    assert ran.returncode in (2, 3), ran.stderr
    assert TOKEN not in ran.stdout + ran.stderr
    assert "Traceback" not in ran.stderr
    assert "thrown while requesting" not in ran.stderr
    assert 1 <= ran.stderr.count(": trying again, for a minute at most\n") <= 2
    assert "Next:" in ran.stderr
    assert set(os.listdir(folder / "work")) <= {"me--model.partial"}  # a stage that the next run goes on from


@pytest.mark.parametrize("kind", ["500", "503", "drop"])
@pytest.mark.parametrize("verb", VERBS)
def test_a_hub_that_fails_at_everything_is_given_up_in_a_minute(verb: str, kind: str, tmp_path: Path) -> None:
    given_up(verb, Fault(".", kind, MANY), tmp_path)


@pytest.mark.parametrize("kind", ["500", "503", "drop"])
@pytest.mark.parametrize("part", PARTS)
def test_a_hub_that_fails_at_one_thing_for_ever_is_given_up_in_a_minute(part: str, kind: str, tmp_path: Path) -> None:
    verb, pattern = PARTS[part]
    given_up(verb, Fault(pattern, kind, MANY), tmp_path)
