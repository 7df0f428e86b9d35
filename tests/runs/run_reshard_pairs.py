"""Each two values of any two axes of `zero/pairs.py`, by real DeepSpeed: saved, cut anew, loaded, gone on with. Slow.

    python tests/runs/run_reshard_pairs.py OUT --trainer PYTHON   a Python that has deepspeed, transformers and peft
    python tests/runs/run_reshard_pairs.py OUT --trainer PYTHON --first 0 --count 20
    python tests/runs/run_reshard_pairs.py OUT --table            what lies in OUT becomes zero/pairs.md

Runs go by way of the files of ranks alone, of our universal checkpoint, or of one that DeepSpeed's ds_to_universal.py
made. What lives after DeepSpeed has loaded the new files has to be what lived: weights, buffers, masters and both
moments bit by bit, rates, decays, steps, scheduler and client state; the losses of five further steps are compared with
those of the uninterrupted run. Exits with 1 on a difference.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from run_reshard_matrix import faults_of, run_jobs  # noqa: E402
from zero.pairs import AXES, KINDS, Pair, covering  # noqa: E402

TABLE = HERE / "zero" / "pairs.md"


def save(python: str, out: Path, asked: Iterable[Pair]) -> None:
    """The runs that don't lie in `out` yet."""
    for ranks in AXES["before"]:
        runs = {p.saved: p for p in asked if p.before == ranks and not (out / p.saved / "losses.json").is_file()}
        run_jobs(python, out, ranks, [
            {"do": "save", "run": str(out / n), "case": n, "stage": p.stage, "options": p.options}
            for n, p in runs.items()
        ])  # fmt: skip


def make_universal(python: str, out: Path, asked: Iterable[Pair]) -> None:
    """What DeepSpeed's own script makes of the runs that go by way of it."""
    names = sorted({p.saved for p in asked if p.way.startswith("DeepSpeed")})
    runs = [
        out / n for n in names if (out / n / "latest").is_file() and not (out / "theirs" / n / "fixture.json").is_file()
    ]
    if not runs:
        return
    command = [python, str(HERE / "zero" / "universal.py"), str(out / "theirs"), *map(str, runs)]
    with (out / "universal.log").open("a") as log:
        subprocess.run(command, check=False, env=os.environ | {"DS_ACCELERATOR": "cpu"}, stdout=log, stderr=log)


def reshard(out: Path, pair: Pair) -> str:
    """What is said where it is refused; empty where it was written."""
    source = out / pair.saved
    if not (source / "losses.json").is_file():
        return "DeepSpeed did not save it"
    if pair.way.startswith("our"):
        if said := written(source, out / f"{pair.name}-universal", to="universal"):
            return said
        source = out / f"{pair.name}-universal"
    if pair.way.startswith("DeepSpeed"):
        source = out / "theirs" / pair.saved
        if not (source / "fixture.json").is_file():
            return "ds_to_universal.py did not make it"
    return written(source, out / pair.name, world_size=pair.after, stage=pair.to)


def written(source: Path, target: Path, **asked: Any) -> str:
    """What `reshard` says where it refuses; empty where it wrote."""
    from converter import reshard_state
    from converter.errors import ConvertError

    shutil.rmtree(target, ignore_errors=True)
    try:
        reshard_state(source, target, **asked)
    except ConvertError as error:
        return f"{error.code}: {error}"
    return ""


def resume(python: str, out: Path, asked: list[Pair]) -> None:
    """Load and go on, each number of ranks in one launch."""
    for ranks in AXES["after"]:
        run_jobs(python, out, ranks, [
            {"do": "resume", "run": str(out / p.name), "out": f"{out / p.name}-live", "case": p.name, "stage": p.to}
            | {"options": p.options}
            for p in asked
            if p.after == ranks and not (Path(f"{out / p.name}-live") / "resumed.json").is_file()
        ])  # fmt: skip


def faults(out: Path, pair: Pair) -> list[str]:
    """Everything in which what lives after loading differs from what lived when the run was saved."""
    return faults_of(Path(f"{out / pair.name}-live"), out / pair.saved, pair.dtype, pair.options.get("groups", 1))


def table(out: Path, asked: list[Pair]) -> str:
    """What was loaded, by kind of run: its values of every axis, and how many were equal."""
    loaded = [p for p in asked if (Path(f"{out / p.name}-live") / "resumed.json").is_file()]
    equal = Counter(p.kind for p in loaded if not faults(out, p))
    axes = [a for a in AXES if a != "kind"]
    lines = ["| run | " + " | ".join(axes) + " | equal |", "| --- " * (len(axes) + 2) + "|"]
    for kind in KINDS:
        own = [p for p in loaded if p.kind == kind]
        cells = [", ".join(str(v) for v in AXES[a] if any(getattr(p, a) == v for p in own)) for a in axes]
        lines.append(f"| {kind} | {' | '.join(cells)} | {equal[kind]} of {len(own)} |")
    return "\n".join([*lines, f"| all | {' | '.join('' for _ in axes)} | {equal.total()} of {len(loaded)} |"]) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--trainer", help="a Python that has DeepSpeed; without it an environment is built")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int)
    parser.add_argument("--table", action="store_true", help="write the table of what was loaded, and do nothing else")
    given = parser.parse_args()
    from run_zero_matrix import DEFAULT, trainer

    every = covering()
    if given.table:
        TABLE.write_text(table(given.out, every))
        return 0
    asked = every[given.first :][: given.count]
    python = given.trainer or trainer(DEFAULT)
    given.out.mkdir(parents=True, exist_ok=True)
    save(python, given.out, asked)
    make_universal(python, given.out, asked)
    refused = {p.name: said for p in asked if (said := reshard(given.out, p))}
    resume(python, given.out, [p for p in asked if p.name not in refused])
    wrong = 0
    for pair in asked:
        found = [refused[pair.name]] if pair.name in refused else faults(given.out, pair)
        wrong += bool(found)
        if found:
            print(f"{pair.name}: {'; '.join(found[:3])}")
    print(f"{len(asked)} resumed, {wrong} differ")
    return 1 if wrong or not asked else 0


if __name__ == "__main__":
    sys.exit(main())
