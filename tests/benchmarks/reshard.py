"""A ZeRO-3 run with Adam's moments, of four ranks, for eight: rlhf-convert, a plain copy, DeepSpeed's ds_to_universal.

python tests/benchmarks/reshard.py [--peer-python PY] [--rounds 3] [--hidden 512 1024] [--scratch DIR] [--json FILE]

PY is a Python with deepspeed (the one that runs this is the default). In turns, each in a fresh process, on a warm page
cache and after a `sync`:

    rlhf-convert     `reshard --world-size 8`: every check on, the output on the disk when it ends
    cp + sync        `cp -r` of what that wrote, then `sync`
    ds_to_universal  DeepSpeed's script with two workers each; what it wrote is not synced
    start-up         the first of them with --dry-run: interpreter, imports, every rank's headers, the plan

Medians over the rounds: wall seconds, processor seconds, and the peak of RssAnon of the process itself (workers that it
starts are not in it). A width of 512 is about 300 MB of masters and moments, 1024 about 1.2 GB.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from measuring import Run, has_deepspeed, timed, warm
from measuring import middle as median
from run import ZERO, table

RANKS = 8
PEER = "deepspeed.checkpoint.ds_to_universal"


def commands(folder: Path, peer: str) -> dict[str, list[str]]:
    """The ways that are compared; each writes a folder of its own."""
    run = str(folder / "run")
    program = [sys.executable, "-m", "converter", "reshard", run, str(folder / "ours"), "--world-size", str(RANKS)]
    workers = ["--num_extract_workers", "2", "--num_merge_workers", "2"]
    tag = ["--input_folder", f"{run}/global_step5", "--output_folder", str(folder / "theirs")]
    return {
        "start-up": [*program, "--dry-run"],
        "rlhf-convert": program,
        "cp + sync": ["cp", "-r", str(folder / "ours"), str(folder / "copy")],
        "ds_to_universal": [peer, "-m", PEER, *tag, *workers],
    }


def compare(folder: Path, rounds: int, ways: dict[str, list[str]]) -> dict[str, list[Run]]:
    """All ways in turns, `rounds` times."""
    found: dict[str, list[Run]] = {way: [] for way in ways}
    timed(ways["start-up"])  # byte code and libraries into the cache
    for _ in range(rounds):
        warm(folder)
        for way, command in ways.items():
            found[way].append(timed(command, sync=way == "cp + sync"))
            print(f"  {way:<15} {found[way][-1].wall:7.2f} s", file=sys.stderr, flush=True)
        for made in ("ours", "theirs", "copy"):
            shutil.rmtree(folder / made, ignore_errors=True)
    return found


def ratios(runs: dict[str, list[Run]]) -> dict[str, float]:
    """The figures that are aimed at: 2 of a copy's wall time at most, and 0.2 of the peer's."""
    ours = median(runs["rlhf-convert"], "wall")
    figures = {"of cp + sync, wall": ours / median(runs["cp + sync"], "wall")}
    if "ds_to_universal" in runs:
        figures["of ds_to_universal, wall"] = ours / median(runs["ds_to_universal"], "wall")
    figures["MB of RssAnon"] = median(runs["rlhf-convert"], "anon") / 1e6
    return figures


def main() -> None:
    """Prints a table and the ratios for each size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--hidden", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--peer-python", default=sys.executable, help="a Python that has deepspeed")
    parser.add_argument("--scratch", type=Path, help="a folder on the disk to measure")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    given = parser.parse_args()
    has_peer = has_deepspeed(given.peer_python)
    if not has_peer:
        print(f"no deepspeed in {given.peer_python}: without ds_to_universal", file=sys.stderr)
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=given.scratch) as scratch:
        for hidden in given.hidden:
            folder = Path(scratch) / str(hidden)
            maker = [sys.executable, str(ZERO), str(folder / "run"), "--stage", "3", "--moments"]
            subprocess.run([*maker, "--hidden", str(hidden)], check=True)
            ways = commands(folder, given.peer_python)
            runs = compare(folder, given.rounds, {w: c for w, c in ways.items() if has_peer or w != "ds_to_universal"})
            size = sum(p.stat().st_size for p in (folder / "run").rglob("*.pt"))
            shutil.rmtree(folder)
            print(f"\nZeRO-3, 4 to {RANKS} ranks, {size / 1e6:.0f} MB, {len(os.sched_getaffinity(0))} cores")
            print("\n".join(table({str(hidden): runs})))
            figures = ratios(runs)
            print("\n".join(f"{value:8.2f} {what}" for what, value in figures.items()), flush=True)
            listed = {w: [vars(r) for r in found] for w, found in runs.items()}
            result[str(hidden)] = {"bytes": size, "runs": listed, "ratios": figures}
    if given.json is not None:
        given.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
