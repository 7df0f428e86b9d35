"""`watch` as a process beside one that saves: killed and started again, and all that it said."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path


def watcher(run: Path, state: Path, *more: str) -> subprocess.Popen[str]:
    """Start `watch` of a run, with short intervals."""
    line = [sys.executable, "-m", "converter", "watch", str(run), "--json", "--state", str(state)]
    line += ["--interval", "0.1", "--settle", "0.6", *more]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def judged_over_a_kill(run: Path, state: Path, writer: subprocess.Popen[bytes], notify: str) -> list[tuple[str, str]]:
    """Name and verdict of each line, as said by a watch that is killed, and by others until all is saved."""
    first = watcher(run, state, "--notify", notify)
    assert first.stdout is not None
    said = first.stdout.readline()
    deadline = time.monotonic() + 30
    while not state.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    first.kill()
    said += first.communicate()[0]
    is_last = False
    while not is_last:
        is_last = writer.poll() is not None
        said += watcher(run, state, "--once", "--notify", notify).communicate(timeout=120)[0]
    told = [json.loads(line) for line in said.splitlines()]
    return [(Path(each["path"]).name, each["verdict"]) for each in told]
