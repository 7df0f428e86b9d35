"""How long a conversion would take on machines that are not here: arithmetic over a model's files and measured rates.

    python tools/simulate.py                                  the table of docs/speed.md
    python tools/simulate.py --plan plan.json --nodes 8 --read 2.5 --write 1.2 --shared 20 --cores 32

A plan is what `converter.plan(...).plan.to_json()` gives. Rates are GB/s: of one machine's reads and writes, and of the
file system that all share. Which file goes to which machine is decided by the function that `--task` uses; everything
else is a division. What it leaves out: other users, a file system's slowness with many small files, lost machines.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from converter.core.writer.plan import Plan
from converter.core.writer.preflight import TORCH_MEMORY
from converter.core.writer.shard_plan import ShardPlan
from converter.core.writer.tasks import partition

START_SECONDS = 2.0
"""The interpreter and `import torch` (measured: tests/benchmarks/README.md)."""

COPY_SECONDS = 0.7
"""Of one core, to copy and sum 1 GB (measured: reshard of 3.09 GB took 3.7 s less 1.4 s of start and planning)."""

MERGE_SECONDS = 5.0
"""Of one core, to merge 1 GB of bf16 with r=16 (measured: 17.4 s for 3.09 GB, less the start)."""

CHUNK_MEMORY = 25_000_000
"""Bytes that merging one chunk holds (measured: 280 MB of RssAnon with two threads)."""

FILE = 5_000_000_000


@dataclass(frozen=True)
class Machines:
    """What there is.

    Attributes:
        read, write: bytes a second of one machine.
        shared: bytes a second of the file system, reads and writes of all machines together.
    """

    nodes: int
    cores: int
    read: float
    write: float
    shared: float


@dataclass(frozen=True)
class Work:
    """Files of an output; of each what has to be read for it, and how much of it is computed."""

    files: Sequence[ShardPlan]
    computed: float
    read: float = 1.0


def seconds(work: Work, machines: Machines) -> tuple[float, str]:
    """Wall time, and what it waits for: the slowest of disk, shared file system and cores on the fullest machine."""
    shares = partition(work.files, machines.nodes)
    fullest = max(sum(f.size for f in share) for share in shares)
    total = sum(f.size for f in work.files)
    each = work.computed * MERGE_SECONDS + (1 - work.computed) * COPY_SECONDS
    limits = {
        "reading": fullest * work.read / machines.read,
        "writing": fullest / machines.write,
        "the shared file system": total * (1 + work.read) / machines.shared,
        "cores": fullest / 1e9 * each / machines.cores,
    }
    slowest = max(limits, key=lambda name: limits[name])
    return START_SECONDS + limits[slowest], slowest


def memory(machines: Machines) -> int:
    """Resident bytes of one machine's process: it does not depend on the model."""
    return TORCH_MEMORY + CHUNK_MEMORY * machines.cores


def of_size(parameters: float, *, computed: float) -> Work:
    """A bf16 model of that many parameters in files of 5 GB."""
    left, files = int(parameters * 2), []
    while left > 0:
        size = min(left, FILE)
        files.append(ShardPlan(f"{len(files):05d}.safetensors", b"", (), b"", size))
        left -= size
    return Work(files, computed)


def of_plan(path: Path) -> Work:
    """The work of a plan."""
    plan = Plan.from_json(json.loads(path.read_text("utf-8")))
    computed = sum(e.length for e in plan.entries if e.runs is None)
    return Work(plan.written, computed / max(plan.total_bytes, 1))


MODELS = {"70B": 70.6e9, "405B": 406e9, "671B": 671e9, "1T": 1.0e12}
COMPUTED = 0.95
"""Of a model whose linear layers all have an adapter."""


def table(machines: Machines) -> Iterator[str]:
    """Markdown: a merge of each model on 1, 8 and 64 machines."""
    yield "| model | machines | seconds | waits for | memory of each |"
    yield "|---|---|---|---|---|"
    for name, parameters in MODELS.items():
        for nodes in (1, 8, 64):
            some = Machines(nodes, machines.cores, machines.read, machines.write, machines.shared)
            took, limit = seconds(of_size(parameters, computed=COMPUTED), some)
            yield f"| {name} | {nodes} | {took:.0f} | {limit} | {memory(some) / 1e6:.0f} MB |"


def main() -> None:
    """Prints the table, or one plan's time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", type=Path)
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--cores", type=int, default=32, help="threads of a machine (--jobs)")
    for name, default in (("read", 2.0), ("write", 1.0), ("shared", 20.0)):
        parser.add_argument(f"--{name}", type=float, default=default, help="GB/s")
    given = parser.parse_args()
    machines = Machines(given.nodes, given.cores, given.read * 1e9, given.write * 1e9, given.shared * 1e9)
    if given.plan is None:
        print("\n".join(table(machines)))
        return
    took, limit = seconds(of_plan(given.plan), machines)
    print(f"{took:.0f} s, waiting for {limit}; {memory(machines) / 1e6:.0f} MB each")


if __name__ == "__main__":
    main()
