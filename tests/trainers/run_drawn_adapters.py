"""Draws adapters with many releases of PEFT, merges each here, and writes what came of them to `peft_releases.md`.

    python tests/trainers/run_drawn_adapters.py SCRATCH [--cases 80] [--seed 3] [--envs DIR] [--only 0.13.2 ...]
    python tests/trainers/run_drawn_adapters.py SCRATCH --sixteen-bits --cases 60 --only 0.13.2 0.18.1 0.21.2

Each release runs in an environment of `run_trainers.py` (`--build openrlhf-0.5.5 ms-swift llamafactory openrlhf` makes
them), with its own PEFT before the others on the path. The truth is the live model of the release that saved. The exit
code is 1 where a merged model says anything else. With `--sixteen-bits` bases are bf16 and fp16, tensors are compared
too, and under the release that runs this each bit of `--numerics peft`; the lines are printed alone.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import peft  # noqa: E402
from run_trainers import DEFAULT  # noqa: E402

RELEASES = {
    **dict.fromkeys(("0.10.0", "0.11.1", "0.12.0", "0.13.2", "0.14.0"), "openrlhf-0.5.5"),
    **dict.fromkeys(("0.15.2", "0.16.0", "0.17.1", "0.18.1"), "ms-swift"),
    **dict.fromkeys(("0.19.0", "0.19.1"), "llamafactory"),
    "0.20.0": "openrlhf",
    "0.21.2": "",
}
"""Releases of PEFT, and environments with a transformers of their time; empty: the one that runs this."""

REASONS = {
    "adapter-base-moved": "start that no file holds",
    "adapter-biases-lost": "trained biases not saved",
    "peft-type-unmergeable": "no merged form",
    "adapter-ambiguous": "two releases differ",
    "adapter-bias": "bias without a place",
    "head-missing": "head not saved",
}
RESULT = HERE / "peft_releases.md"


def drawn(release: str, folder: Path, asked: argparse.Namespace) -> None:
    """The cases of one release, made by it."""
    name, own = RELEASES[release], asked.envs / "peft" / release
    python = asked.envs / name / "bin" / "python" if name else Path(sys.executable)
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    if name:
        if not own.is_dir():
            install = [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps"]
            subprocess.run([*install, "--target", own, f"peft=={release}"], check=True)
        environment["PYTHONPATH"] = str(own)
    drawing = "draw_sixteen_bits.py" if asked.sixteen_bits else "draw_adapters.py"
    script = [python, HERE / drawing, folder, str(asked.seed), "0", str(asked.cases)]
    with (folder.parent / f"{folder.name}.drawn").open("w") as log:
        subprocess.run(script, check=True, env=environment, stdout=log, stderr=subprocess.STDOUT)


def judged(folder: Path, judging: str) -> list[dict[str, Any]]:
    """What came of the cases of a folder."""
    ran = subprocess.run([sys.executable, HERE / judging, folder], check=False, capture_output=True, text=True)
    return [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{")]


def row(release: str, found: list[dict[str, Any]]) -> str:
    """A release's line of the table."""
    kinds, codes = Counter(f["is"] for f in found), Counter(f["code"] for f in found if f["is"] == "refused")
    refused = ", ".join(f"{n} {REASONS.get(code, f'`{code}`')}" for code, n in sorted(codes.items()))
    used = ", ".join(sorted({f["transformers"] for f in found}))
    cells = [release, used, len({f["kind"] for f in found}), len(found),
             kinds["right"], refused, kinds["wrong"] + kinds["crashed"]]  # fmt: skip
    return "| " + " | ".join(map(str, cells)) + " |"


def main() -> int:
    """Draw, judge, and write the table where every release ran."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--cases", type=int, default=80)
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--envs", type=Path, default=DEFAULT)
    parser.add_argument("--only", nargs="*", default=list(RELEASES), choices=list(RELEASES), metavar="RELEASE")
    parser.add_argument("--sixteen-bits", action="store_true")
    asked = parser.parse_args()
    asked.scratch.mkdir(parents=True, exist_ok=True)
    lines, wrong = [], 0
    for release in asked.only:
        folder = asked.scratch / release
        if not folder.is_dir():
            drawn(release, folder, asked)
        found = judged(folder, "judge_sixteen_bits.py" if asked.sixteen_bits else "judge_adapters.py")
        lines.append(row(release, found))
        print(lines[-1], flush=True)
        for each in found:
            other_bits = each["peft"] == peft.__version__ and each.get("bits", "equal") != "equal"
            if each["is"] in ("wrong", "crashed") or other_bits:
                wrong += 1
                print(json.dumps(each), flush=True)
    if asked.only == list(RELEASES) and not asked.sixteen_bits:
        head = ["PEFT", "transformers", "methods", "adapters", "as its live model", "refused", "otherwise"]
        RESULT.write_text("\n".join([f"| {' | '.join(head)} |", "|" + " --- |" * len(head), *lines, ""]), "utf-8")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
