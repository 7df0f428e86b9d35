"""What a signal does depends on how the program was started: what the caller ignores stays ignored."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

pytestmark = pytest.mark.signals

LOG = b"unknown zero stage 1\n"
ANSWER = b"ERROR zero-stage-unknown (line 1)\n"


@contextmanager
def reading(ignored: str = "") -> Iterator[subprocess.Popen[bytes]]:
    """`explain -` that has answered one line and waits for the next, started as `nohup` starts programs."""
    trap = f"trap '' {ignored}; " if ignored else ""
    line = ["sh", "-c", f'{trap}exec "$@"', "sh", sys.executable, "-m", "converter", "explain", "-"]
    env = {**os.environ, "LC_ALL": "C"}
    pipe = subprocess.PIPE
    with subprocess.Popen(line, stdin=pipe, stdout=pipe, stderr=pipe, env=env) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(LOG)
        child.stdin.flush()
        assert child.stdout.readline() == ANSWER
        yield child


@pytest.mark.parametrize(
    ("ignored", "number"), [("INT", signal.SIGINT), ("TERM", signal.SIGTERM), ("INT TERM", signal.SIGINT)]
)
def test_a_signal_that_the_caller_ignores_does_not_end_a_run(ignored: str, number: signal.Signals) -> None:
    with reading(ignored) as child:
        child.send_signal(number)
        out, err = child.communicate(b"numels: consumed 3 numels out of 4\n", timeout=60)
    assert (child.returncode, err) == (0, b"")
    assert b"ERROR zero-consumed (line 2)" in out


@pytest.mark.parametrize(
    ("ignored", "number", "code"),
    [("", signal.SIGINT, 130), ("", signal.SIGTERM, 143), ("INT", signal.SIGTERM, 143), ("TERM", signal.SIGINT, 130)],
)
def test_a_signal_that_is_not_ignored_ends_a_run_without_a_traceback(
    ignored: str, number: signal.Signals, code: int
) -> None:
    with reading(ignored) as child:
        child.send_signal(number)
        _, err = child.communicate(timeout=60)
    assert child.returncode == code
    assert err.startswith(b"STOPPED interrupted\n")
    assert b"Traceback" not in err
