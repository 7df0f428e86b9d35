"""ZeRO-2 and ZeRO-3 checkpoints of four ranks made a model of: rlhf-convert, DeepSpeed's zero_to_fp32, a plain copy.

python tests/benchmarks/gather.py [--peer-python PY] [--rounds 3] [--layers 5 28] [--scratch DIR] [--json FILE]

PY is a Python with deepspeed (the one that runs this is the default). For each stage, in turns, each in a fresh
process, on a warm page cache and after a `sync`:

    rlhf-convert   `gather --master`: fp32, as zero_to_fp32 writes; every check on, the output on the disk when it ends
    bf16           `gather`: in the dtype of training, which is the default
    zero_to_fp32   DeepSpeed's script with --safe_serialization; what it wrote is not synced
    cp + sync      `cp -r` of what the first of them wrote, then `sync`
    start-up       the first of them with --dry-run: interpreter, imports, every rank's headers, the plan
    torch          the interpreter and `import torch`, which only computing needs, as rounding to bf16 does

Medians over the rounds: wall seconds, user and system seconds of the processor, and the peak of RssAnon, sampled from
/proc (pages of mapped files, which the system can drop, are not in it). After the first round the outputs of the first
and third are compared tensor by tensor. The first number of layers is 400 MB of fp32 masters; for further ones
rlhf-convert runs alone, to show that memory does not grow with the model.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAKER = Path(__file__).resolve().parents[1] / "runs" / "zero" / "large.py"
SAMPLE_SECONDS = 0.004
PEER = "import runpy; runpy.run_module('deepspeed.utils.zero_to_fp32', run_name='__main__')"
COMPARE = """
import sys
from pathlib import Path
from safetensors import safe_open
def tensors(folder):
    for path in sorted(Path(folder).glob('*.safetensors')):
        with safe_open(path, 'pt') as file:
            yield from ((name, path) for name in file.keys())
ours, theirs = (dict(tensors(f)) for f in sys.argv[1:])
assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
for name in ours:
    with safe_open(ours[name], 'pt') as a, safe_open(theirs[name], 'pt') as b:
        assert a.get_tensor(name).equal(b.get_tensor(name)), name
"""


@dataclass(frozen=True)
class Run:
    """One process: seconds of wall time and of processor time, and its peak of anonymous bytes."""

    wall: float
    cpu: float
    anon: int


def timed(command: list[str], *, sync: bool = False) -> Run:
    """Run a command to its end; `sync`: with what it wrote brought to the disk."""
    subprocess.run(["sync"], check=True)
    with tempfile.TemporaryFile() as said:
        begun = time.perf_counter()
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said)
        peak = [0]
        ended = threading.Event()
        sampler = threading.Thread(target=_sample, args=(child.pid, peak, ended))
        sampler.start()
        _, status, usage = os.wait4(child.pid, 0)
        ended.set()
        sampler.join()
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            said.seek(0)
            raise SystemExit(f"{command[:3]} ended with {child.returncode}:\n{said.read().decode(errors='replace')}")
    if sync:
        subprocess.run(["sync"], check=True)
    return Run(time.perf_counter() - begun, usage.ru_utime + usage.ru_stime, peak[0])


def _sample(pid: int, peak: list[int], ended: threading.Event) -> None:
    while not ended.wait(SAMPLE_SECONDS):
        try:
            text = Path(f"/proc/{pid}/status").read_text()
        except OSError:
            return
        for line in text.splitlines():
            if line.startswith("RssAnon:"):
                peak[0] = max(peak[0], int(line.split()[1]) * 1024)


def warm(folder: Path) -> None:
    """Bring the inputs into the page cache."""
    for path in folder.rglob("*.pt"):
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 24):
                pass


def commands(folder: Path, peer: str) -> dict[str, list[str]]:
    """The ways that are compared; each writes a folder of its own."""
    run = str(folder / "run")
    program = [sys.executable, "-m", "converter"]
    return {
        "start-up": [*program, "gather", run, str(folder / "ours"), "--master", "--dry-run"],
        "rlhf-convert": [*program, "gather", run, str(folder / "ours"), "--master"],
        "zero_to_fp32": [peer, "-c", PEER, run, str(folder / "theirs"), "--safe_serialization"],
        "cp + sync": ["cp", "-r", str(folder / "ours"), str(folder / "copy")],
        "torch": [sys.executable, "-c", "import torch"],
        "bf16": [*program, "gather", run, str(folder / "cast")],
    }


def compare(folder: Path, rounds: int, ways: dict[str, list[str]]) -> dict[str, list[Run]]:
    """All ways in turns, `rounds` times."""
    found: dict[str, list[Run]] = {way: [] for way in ways}
    for way in ("start-up", "torch"):
        timed(ways[way])  # byte code and libraries into the cache
    for number in range(rounds):
        warm(folder)
        for way, command in ways.items():
            found[way].append(timed(command, sync=way == "cp + sync"))
            print(f"  {way:<13} {found[way][-1].wall:7.2f} s", file=sys.stderr, flush=True)
        if number == 0 and "zero_to_fp32" in ways:
            subprocess.run([sys.executable, "-c", COMPARE, folder / "ours", folder / "theirs"], check=True)
        for made in ("ours", "theirs", "copy", "cast"):
            shutil.rmtree(folder / made, ignore_errors=True)
    return found


def median(runs: list[Run], what: str) -> float:
    """The median of one figure."""
    return statistics.median(getattr(r, what) for r in runs)


def table(runs: dict[str, list[Run]]) -> list[str]:
    """One line a way."""
    lines = [f"{'':<13} {'wall s':>8} {'min-max':>13} {'cpu s':>8} {'RssAnon MB':>11}"]
    for way, found in runs.items():
        walls = [r.wall for r in found]
        lines.append(
            f"{way:<13} {median(found, 'wall'):8.2f} {min(walls):6.2f}-{max(walls):6.2f} {median(found, 'cpu'):8.2f} "
            f"{median(found, 'anon') / 1e6:11.0f}"
        )
    return lines


def ratios(runs: dict[str, list[Run]]) -> dict[str, float]:
    """The figures that are aimed at: 0.3 of the peer's wall time, and 1 of the bound, at most."""
    figures: dict[str, float] = {}
    ours = runs["rlhf-convert"]
    if "zero_to_fp32" in runs:
        theirs = runs["zero_to_fp32"]
        figures["of zero_to_fp32's wall time"] = median(ours, "wall") / median(theirs, "wall")
        figures["of zero_to_fp32's processor time"] = median(ours, "cpu") / median(theirs, "cpu")
        figures["of zero_to_fp32's RssAnon"] = median(ours, "anon") / median(theirs, "anon")
    if "cp + sync" in runs:
        bound = 1.3 * median(runs["cp + sync"], "wall") + median(runs["start-up"], "wall")
        figures["of 1.3 x (cp + sync) + start-up, wall"] = median(ours, "wall") / bound
    figures["MB of RssAnon, fp32"] = median(ours, "anon") / 1e6
    figures["MB of RssAnon, bf16"] = median(runs["bf16"], "anon") / 1e6
    return figures


def has_deepspeed(python: str) -> bool:
    """Whether the peer can run there."""
    return subprocess.run([python, "-c", "import deepspeed"], capture_output=True, check=False).returncode == 0


def main() -> None:
    """Prints a table and the ratios for each size and stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, nargs="+", default=[5])
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 3], choices=[2, 3])
    parser.add_argument("--peer-python", default=sys.executable, help="a Python that has deepspeed")
    parser.add_argument("--scratch", type=Path, help="a folder on the disk to measure")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    given = parser.parse_args()
    has_peer = has_deepspeed(given.peer_python)
    if not has_peer:
        print(f"no deepspeed in {given.peer_python}: without zero_to_fp32", file=sys.stderr)
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=given.scratch) as scratch:
        for number, layers in enumerate(given.layers):
            for stage in given.stages:
                folder = Path(scratch) / f"{layers}-{stage}"
                maker = [sys.executable, str(MAKER), str(folder / "run"), "--stage", str(stage)]
                subprocess.run([*maker, "--layers", str(layers)], check=True)
                ways = commands(folder, given.peer_python)
                left_out = set() if has_peer else {"zero_to_fp32"}
                left_out |= {"zero_to_fp32", "cp + sync"} if number else set()
                runs = compare(folder, given.rounds, {w: c for w, c in ways.items() if w not in left_out})
                size = sum(p.stat().st_size for p in folder.rglob("*optim_states.pt"))
                shutil.rmtree(folder)
                cores = len(os.sched_getaffinity(0))
                print(f"\nZeRO-{stage}, {layers} layers, {size / 1e6:.0f} MB of masters, {cores} cores")
                print("\n".join(table(runs)))
                figures = ratios(runs)
                print("\n".join(f"{value:8.2f} {what}" for what, value in figures.items()), flush=True)
                listed = {w: [vars(r) for r in found] for w, found in runs.items()}
                result[f"{layers}-{stage}"] = {"bytes": size, "runs": listed, "ratios": figures}
    if given.json is not None:
        given.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
