"""The whole matrix: trains every case with real DeepSpeed and compares what is gathered with what lived. Slow.

    python tests/run_zero_matrix.py OUT --trainer PYTHON [--ranks 1 2 3 4 11]

PYTHON has deepspeed, transformers and peft; the Python that runs this has rlhf-convert. Exits with 1 on a difference.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--trainer", required=True, help="a Python that has DeepSpeed")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--case", action="append", default=[])
    given = parser.parse_args()
    chosen = [word for case in given.case for word in ("--case", case)]
    for ranks in given.ranks:
        train = [given.trainer, str(HERE / "zero" / "train.py"), str(given.out), "--ranks", str(ranks), *chosen]
        subprocess.run(train, check=True)
    sys.path.insert(0, str(HERE))
    from zero.compare import faults, run_names

    wrong = 0
    for name in run_names(given.out):
        found = faults(given.out / name)
        wrong += bool(found)
        print(f"{name}: {'; '.join(found[:3]) or 'equal'}")
    print(f"{len(run_names(given.out))} runs, {wrong} differ")
    return 1 if wrong or not run_names(given.out) else 0


if __name__ == "__main__":
    sys.exit(main())
