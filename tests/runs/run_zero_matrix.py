"""The whole matrix: trains every case with real DeepSpeed and compares what is gathered with what lived. Slow.

    python tests/runs/run_zero_matrix.py OUT                     builds an environment with DeepSpeed, once, and uses it
    python tests/runs/run_zero_matrix.py OUT --trainer PYTHON    a Python that has deepspeed, transformers and peft
    python tests/runs/run_zero_matrix.py OUT --compare-only      what was trained before, again

Every run is then made universal by DeepSpeed's own script and compared again, and the tests marked `trainer` that show
what DeepSpeed's tools lose are run. Exits with 1 on a difference. The Python that runs this has rlhf-convert.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import venv
from collections import Counter
from pathlib import Path

HERE = Path(__file__).parent
DEFAULT = Path("~/.cache/rlhf-convert-trainers/deepspeed").expanduser()
PACKAGES = ("torch==2.13.0", "numpy", "safetensors", "transformers==5.23.0", "peft==0.21.2", "deepspeed==0.19.8")
MANY_RANKS = 11  # so that rank 10 comes after rank 2
MANY = ("odd", "subgroups", "lora")


def trainer(folder: Path) -> str:
    """A Python with DeepSpeed, in an environment that is built if it isn't there."""
    python = folder / "bin" / "python"
    if not (folder / "built").is_file():
        print(f"building {folder}", flush=True)
        venv.create(folder, with_pip=True, clear=True)
        pip = [str(python), "-m", "pip", "install", "-q", "-c", str(HERE.parents[1] / "constraints.txt")]
        # Its operators are built when they are used, and setuptools must be there before.
        subprocess.run([*pip, "setuptools", "wheel", *PACKAGES[:2]], check=True)
        subprocess.run([*pip, "--no-build-isolation", *PACKAGES], check=True, env=os.environ | {"DS_BUILD_OPS": "0"})
        (folder / "built").touch()
    return str(python)


def train(python: str, out: Path, ranks: list[int], cases: list[str]) -> None:
    for count in ranks:
        chosen = [c for c in cases if c in MANY] if count >= MANY_RANKS else cases
        words = [word for case in chosen for word in ("--case", case)]
        subprocess.run([python, str(HERE / "zero" / "train.py"), str(out), "--ranks", str(count), *words], check=True)


def make_universal(python: str, out: Path, names: list[str]) -> Path:
    """Universal checkpoints of all runs that ZeRO partitioned."""
    folder = out / "universal"
    runs = [str(out / n) for n in names]
    command = [python, str(HERE / "zero" / "universal.py"), str(folder), *runs]
    with (out / "universal.log").open("w") as log:
        subprocess.run(command, check=True, env=os.environ | {"DS_ACCELERATOR": "cpu"}, stdout=log, stderr=log)
    return folder


def compare(root: Path, what: str) -> int:
    """Print how many runs are equal, by stage and ranks, and each difference; the number of runs that differ."""
    from converter.errors import Refused
    from zero.compare import facts, faults, run_names

    equal: Counter[tuple[int, int]] = Counter()
    total: Counter[tuple[int, int]] = Counter()
    refused: Counter[str] = Counter()
    for name in run_names(root):
        told = facts(root / name)
        place = (told["stage"], told["ranks"])
        total[place] += 1
        try:
            found = faults(root / name)
        except Refused as error:
            refused[error.code] += 1
            right = error.code == "zero-round-robin" and told["case"] == "roundrobin" and told["ranks"] > 1
            found = [] if right else [str(error)]
        equal[place] += not found
        if found:
            print(f"{name}: {len(found)} differences: {'; '.join(found[:3])}")
    ranks = sorted({r for _, r in total})
    print(f"{what}: runs equal bit by bit (or rightly refused: {dict(refused)})")
    print("stage  " + "".join(f"{f'{r} ranks':>10}" for r in ranks))
    for stage in sorted({s for s, _ in total}):
        cells = [f"{equal[stage, r]}/{total[stage, r]}" if total[stage, r] else "" for r in ranks]
        print(f"{stage:<7}" + "".join(f"{c:>10}" for c in cells))
    wrong = total.total() - equal.total()
    print(f"{total.total()} runs, {wrong} differ")
    return wrong if total else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--trainer", help="a Python that has DeepSpeed; without it an environment is built")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 3, 4, MANY_RANKS])
    parser.add_argument("--case", action="append")
    parser.add_argument("--compare-only", action="store_true")
    given = parser.parse_args()
    sys.path.insert(0, str(HERE))
    from zero.compare import facts, run_names
    from zero.train import CASES

    python = given.trainer or trainer(DEFAULT)
    if not given.compare_only:
        train(python, given.out, given.ranks, given.case or sorted(CASES))
    wrong = compare(given.out, "ranks' files")
    partitioned = [n for n in run_names(given.out) if facts(given.out / n)["stage"]]
    wrong += compare(make_universal(python, given.out, partitioned), "universal checkpoints")
    tests = HERE.parent / "sources" / "test_zero_peers.py"
    peers = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-m", "trainer", str(tests)]
    done = subprocess.run(peers, check=False, env=os.environ | {"RLHF_CONVERT_DEEPSPEED": python})
    return 1 if wrong or done.returncode else 0


if __name__ == "__main__":
    sys.exit(main())
