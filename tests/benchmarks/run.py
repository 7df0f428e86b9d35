"""What rlhf-convert takes, beside a plain copy of the same bytes and beside the tool that users run today.

python tests/benchmarks/run.py [CASE ...] [--size 1.5B] [--rounds 3] [--peer-python PY] [--scratch DIR] [--json FILE]

Each case is run in turns (ours, the copy, the peer), each in a fresh process, on a warm page cache and after a `sync`;
the copy is `cp -r` of what ours wrote, and `sync`. Figures are medians; ratios are medians of the pairs, so that they
hold where the machine's speed drifts. PY is a Python with deepspeed; without one `gather` has no peer.

    merge        an all-linear adapter, r=16, into a bf16 model; the peer is PEFT's merge_and_unload
    gather-S-N   a ZeRO-S run of N ranks, 388 MB of fp32 masters, `--master`; the peer is DeepSpeed's zero_to_fp32
    gather-large the same of stage 3 and 8 ranks with 6.3 GB; no peer, which would hold it in memory
    gather-megatron  the model as a torch_dist checkpoint of megatron-core; no peer that needs no GPU does it from files
    rm-to-critic, fresh-head, reshard, cast, doctor: of the same model; no peer does the same work

Cases and sizes are listed by --help. The disk needs four times the model.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measuring import Run, middle, paired, timed, warm
from shapes import SIZES

ZERO = Path(__file__).resolve().parents[1] / "runs" / "zero" / "large.py"
SHAPES = Path(__file__).with_name("shapes.py")
PROGRAM = (sys.executable, "-m", "converter")

PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
"""
ZERO_TO_FP32 = "import runpy; runpy.run_module('deepspeed.utils.zero_to_fp32', run_name='__main__')"
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

OURS, COPY, PEER = "rlhf-convert", "cp + sync", "peer"
Command = Sequence[str | Path]


@dataclass(frozen=True)
class Case:
    """Work to be measured.

    Attributes:
        inputs: the folder that is made for it, which cases share.
        make: makes that folder.
        ours: our command, of the inputs and the output.
        peer: the peer's; None where none does the same work.
        is_equal: the peer writes the same values, which are compared once.
        writes: False where nothing is written; then nothing is copied.
    """

    inputs: str
    make: Command
    ours: Command
    peer: Command | None = None
    is_equal: bool = False
    writes: bool = True


def cases(scratch: Path, size: str, peer_python: str | None) -> dict[str, Case]:
    """Every case by name; inputs lie in `scratch`."""
    model, reward = scratch / "model", scratch / "reward"
    out, other = scratch / "out", scratch / "peer"
    base, adapter, rm = model / "base", model / "adapter", reward / "rm"
    makes_model: Command = (sys.executable, SHAPES, model, "--size", size)
    makes_reward: Command = (*(sys.executable, SHAPES, reward, "--size", size), "--reward")
    merged: Command = (sys.executable, "-c", PEFT, base, adapter, other)
    critic: Command = (*PROGRAM, "rm-to-critic", rm, out, "--to", "openrlhf")
    fresh: Command = (*PROGRAM, "rm-to-critic", base, out, "--to", "openrlhf", "--init-head", "zeros")
    found = {
        "merge": Case("model", makes_model, (*PROGRAM, "merge-lora", adapter, out, "--base", base), merged),
        "reshard": Case("model", makes_model, (*PROGRAM, "reshard", base, out, "--max-shard-size", "1GB")),
        "cast": Case("model", makes_model, (*PROGRAM, "reshard", base, out, "--dtype", "float16")),
        "doctor": Case("model", makes_model, (*PROGRAM, "doctor", base), writes=False),
        "rm-to-critic": Case("reward", makes_reward, critic),
        "fresh-head": Case("model", makes_model, fresh),
    }
    for stage in (2, 3):
        for ranks in (2, 8, 64):
            name = f"zero-{stage}-{ranks}"
            run = scratch / name
            make = (sys.executable, ZERO, run, "--stage", str(stage), "--ranks", str(ranks))
            peer = (peer_python, "-c", ZERO_TO_FP32, run, other, "--safe_serialization") if peer_python else None
            found[f"gather-{stage}-{ranks}"] = Case(
                name, make, (*PROGRAM, "gather", run, out, "--master"), peer, is_equal=True
            )
    run = scratch / "zero-large"
    shape = ("--stage", "3", "--ranks", "8", "--layers", "28", "--hidden", "2048", "--vocab", "64000")
    found["gather-large"] = Case(
        run.name, (sys.executable, ZERO, run, *shape), (*PROGRAM, "gather", run, out, "--master")
    )
    # Written by ours, whose folders megatron-core loads (tests/runs/run_mcore_written.py).
    made = (
        f"{sys.executable} {SHAPES} $0/made --size {size} && {sys.executable} -m converter convert $0/made/base $0/run"
    )
    wrote: Command = ("sh", "-ec", f"{made} --to megatron --role actor && rm -r $0/made/adapter", scratch / "megatron")
    run, base = scratch / "megatron" / "run", scratch / "megatron" / "made" / "base"
    found["gather-megatron"] = Case("megatron", wrote, (*PROGRAM, "gather", run, out, "--base", base))
    return found


def measure(case: Case, scratch: Path, rounds: int) -> dict[str, list[Run]]:
    """The ways of one case in turns."""
    inputs, out, copy, other = (scratch / n for n in (case.inputs, "out", "copy", "peer"))
    if not inputs.exists():
        subprocess.run(case.make, check=True)
    found: dict[str, list[Run]] = {}

    def turn(way: str, command: Command, *, sync: bool = False) -> None:
        found.setdefault(way, []).append(timed(command, sync=sync))
        print(f"  {way:<13} {found[way][-1].wall:7.2f} s", file=sys.stderr, flush=True)

    for _ in range(rounds):
        warm(inputs)
        turn(OURS, case.ours)
        if case.writes:
            turn(COPY, ("cp", "-r", out, copy), sync=True)
            shutil.rmtree(copy)
        if case.peer is not None:
            turn(PEER, case.peer)
            if case.is_equal and len(found[PEER]) == 1:
                subprocess.run((sys.executable, "-c", COMPARE, out, other), check=True)
        for folder in (out, other):
            shutil.rmtree(folder, ignore_errors=True)
    return found


def table(results: Mapping[str, Mapping[str, list[Run]]]) -> list[str]:
    """Markdown: a row for each way of each case, with our ratio to it."""
    columns = [
        "case",
        "",
        "wall s",
        "min to max",
        "user s",
        "system s",
        "peak MB",
        "RssAnon MB",
        "read MB",
        "written MB",
    ]
    columns += ["our wall", "our CPU"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name, runs in results.items():
        for way, made in runs.items():
            walls = [r.wall for r in made]
            ratios = "| |" if way == OURS else f"| {ratio(runs, way):.2f} | {cpu_ratio(runs, way):.2f} |"
            memory = " | ".join(f"{middle(made, w) / 1e6:.0f}" for w in ("peak", "anon", "read", "written"))
            clocks = f"{middle(made, 'wall'):.2f} | {min(walls):.2f} to {max(walls):.2f}"
            cpu = f"{middle(made, 'user'):.2f} | {middle(made, 'system'):.2f}"
            lines.append(f"| {name} | {way} | {clocks} | {cpu} | {memory} {ratios}")
    return lines


def ratio(runs: Mapping[str, list[Run]], way: str) -> float:
    """Our wall time by another's, pair by pair."""
    return paired(runs[OURS], runs[way], "wall")


def cpu_ratio(runs: Mapping[str, list[Run]], way: str) -> float:
    """Our processor time by another's, by their medians."""
    ours, theirs = (middle(runs[w], "user") + middle(runs[w], "system") for w in (OURS, way))
    return ours / theirs if theirs else 0.0


def main() -> None:
    """Prints the table."""
    names = list(cases(Path(), "1.5B", None))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", nargs="*", help=f"of: {', '.join(names)}; all where none is named")
    parser.add_argument("--size", choices=SIZES, default="1.5B")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer-python", help="a Python that has deepspeed")
    parser.add_argument("--scratch", type=Path, help="a folder on the disk to measure")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    given = parser.parse_args()
    if unknown := set(given.case) - set(names):
        parser.error(f"no such case: {', '.join(sorted(unknown))}")
    results: dict[str, dict[str, list[Run]]] = {}
    with tempfile.TemporaryDirectory(dir=given.scratch) as made:
        scratch = Path(made)
        known = cases(scratch, given.size, given.peer_python)
        chosen = [n for n in names if n in given.case or not given.case]
        for at, name in enumerate(chosen):
            print(name, file=sys.stderr, flush=True)
            results[name] = measure(known[name], scratch, given.rounds)
            if known[name].inputs not in {known[n].inputs for n in chosen[at + 1 :]}:
                shutil.rmtree(scratch / known[name].inputs)
    cores = len(os.sched_getaffinity(0))
    print(f"{given.size}, {cores} cores, {given.rounds} rounds\n")
    print("\n".join(table(results)))
    if given.json is not None:
        listed: dict[str, Any] = {
            n: {w: [dataclasses.asdict(r) for r in made] for w, made in runs.items()} for n, runs in results.items()
        }
        given.json.write_text(json.dumps({"size": given.size, "cores": cores, "cases": listed}, indent=2) + "\n")


if __name__ == "__main__":
    main()
