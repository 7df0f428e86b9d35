"""One process run to its end, with what the system says that it took."""

from __future__ import annotations

import os
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SAMPLE_SECONDS = 0.005


@dataclass(frozen=True)
class Run:
    """One process, and the processes that it waited for.

    Attributes:
        user, system: seconds of the processor.
        peak: resident bytes of the largest process, pages of mapped files among them.
        anon: resident bytes of the process that are its own (RssAnon), sampled.
        read, written: bytes that went through read and write calls.
    """

    wall: float
    user: float
    system: float
    peak: int
    anon: int
    read: int
    written: int


def timed(command: Sequence[str | Path], *, sync: bool = False) -> Run:
    """Run a command to its end; `sync`: with what it wrote brought to the disk.

    Raises:
        SystemExit: the command failed.
    """
    subprocess.run(["sync"], check=True)
    with tempfile.TemporaryFile() as said:
        begun = time.perf_counter()
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said)
        peak, ended = [0], threading.Event()
        sampler = threading.Thread(target=_sample, args=(child.pid, peak, ended))
        sampler.start()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        read, written = _transferred(child.pid)
        _, status, usage = os.wait4(child.pid, 0)
        ended.set()
        sampler.join()
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            said.seek(0)
            raise SystemExit(f"{command[:3]} ended with {child.returncode}:\n{said.read().decode(errors='replace')}")
    if sync:
        subprocess.run(["sync"], check=True)
    wall = time.perf_counter() - begun
    return Run(wall, usage.ru_utime, usage.ru_stime, usage.ru_maxrss * 1024, peak[0], read, written)


def _sample(pid: int, peak: list[int], ended: threading.Event) -> None:
    while not ended.wait(SAMPLE_SECONDS):
        peak[0] = max(peak[0], _fields(f"/proc/{pid}/status").get("RssAnon", 0) * 1024)


def _transferred(pid: int) -> tuple[int, int]:
    fields = _fields(f"/proc/{pid}/io")
    return fields.get("rchar", 0), fields.get("wchar", 0)


def _fields(path: str) -> dict[str, int]:
    """Numbers by name, of a file in /proc that lists one a line."""
    found: dict[str, int] = {}
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return found
    for line in lines:
        name, _, rest = line.partition(":")
        first = rest.split()[:1]
        if first and first[0].isdigit():
            found[name] = int(first[0])
    return found


def warm(folder: Path) -> None:
    """Bring every file of a folder into the page cache."""
    for path in (p for p in folder.rglob("*") if p.is_file()):
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 22):
                pass


def middle(runs: Sequence[Run], what: str) -> float:
    """The median of one figure."""
    return statistics.median(getattr(r, what) for r in runs)


def paired(one: Sequence[Run], two: Sequence[Run], what: str) -> float:
    """The median of the ratios of runs that were made one right after the other; 0 where there is nothing to divide."""
    ratios = [getattr(a, what) / getattr(b, what) for a, b in zip(one, two, strict=True) if getattr(b, what)]
    return statistics.median(ratios) if ratios else 0.0


def has_deepspeed(python: str) -> bool:
    """Whether DeepSpeed's own scripts can run there."""
    return subprocess.run([python, "-c", "import deepspeed"], capture_output=True, check=False).returncode == 0
