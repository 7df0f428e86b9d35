"""A process for each rank of a small distributed run, on this machine's CPU. Imported by scripts that trainers run."""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path


def run_ranks(count: int, *command: object, seconds: float | None = None, **environment: str) -> None:
    """`python COMMAND` once for each rank, with the variables that torch.distributed and DeepSpeed read.

    Args:
        seconds: for which each is waited; then, or where the first one fails to end, all are ended.

    Raises:
        SystemExit: a rank failed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    sizes = dict.fromkeys(("WORLD_SIZE", "LOCAL_SIZE", "LOCAL_WORLD_SIZE"), str(count))
    words = [sys.executable, *map(str, command)]
    workers = [
        subprocess.Popen(words, env=os.environ | common | sizes | {"RANK": str(r), "LOCAL_RANK": str(r)} | environment)
        for r in range(count)
    ]
    try:
        codes = [worker.wait(timeout=seconds) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    if any(codes):
        raise SystemExit(f"ranks ended with {codes}")


def run_jobs(script: str, about: str | None, work: Callable[[Path], None]) -> None:
    """The command line `JOBS --ranks N` of a script: starts the ranks, each of which does `work(JOBS)`."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jobs", type=Path)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--worker", action="store_true")
    given = parser.parse_args()
    if given.worker:
        work(given.jobs)
    else:
        run_ranks(given.ranks, script, given.jobs, "--worker")
