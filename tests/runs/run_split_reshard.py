"""Runs that were split by experts, layers or within tensors, loaded by real DeepSpeed on other ranks. Slow.

    python tests/runs/run_split_reshard.py OUT                    builds an environment with DeepSpeed, once
    python tests/runs/run_split_reshard.py OUT --trainer PYTHON   a Python that has deepspeed and transformers
    python tests/runs/run_split_reshard.py OUT --only tp:1:2:4    a case, its stage, ranks before and after

Each is saved, cut anew by `reshard`, and loaded by a model that was trained otherwise. What then lives has to be what
lived: weights, buffers, masters and both moments, by name, bit by bit; of models of transformers the logits too.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
TRIES = (
    ("tp", 1, 2, 4), ("tp", 1, 4, 2), ("tp-fp32", 2, 2, 4), ("tp-tied", 1, 4, 2),
    ("pipe", 1, 2, 4), ("pipe", 1, 4, 2), ("pipe-llama", 1, 4, 2), ("pipe-fp32", 1, 2, 4),
    ("moe", 1, 4, 2), ("moe-fp32", 2, 2, 4), ("moe-data-first", 2, 4, 2), ("moe-mixed", 2, 2, 4),
    ("moe-fp16", 2, 2, 4), ("moe-residual", 1, 2, 4), ("autoep-fp32", 2, 2, 4), ("autoep-mixtral", 1, 2, 4),
)  # fmt: skip


def split(python: str, out: Path, case: str, stage: int, ranks: int, *more: object) -> None:
    """What `zero/split.py` does."""
    command = [python, HERE / "zero" / "split.py", out, "--ranks", ranks, "--case", case, "--stage", stage, *more]
    with (out.parent / f"{out.name}.log").open("a") as log:
        subprocess.run([str(c) for c in command], check=True, stdout=log, stderr=log, timeout=900)


def faults(python: str, out: Path, case: str, stage: int, before: int, after: int) -> list[str]:
    """What differs between what lived and what lives on other ranks."""
    from safetensors.torch import load_file

    from converter import reshard_state
    from zero.compare import differences

    run = out / "saved" / f"{case}-z{stage}-n{before}"
    (out / "saved").mkdir(parents=True, exist_ok=True)
    if not (run / "oracle.safetensors").is_file():
        split(python, out / "saved", case, stage, before)
    new = out / f"{run.name}-on-{after}"
    shutil.rmtree(new, ignore_errors=True)
    reshard_state(run, new, world_size=after)
    (out / "live").mkdir(exist_ok=True)
    split(python, out / "live", case, stage, after, "--load", new)
    live = load_file(out / "live" / f"{case}-z{stage}-n{after}" / "oracle.safetensors")
    lived = load_file(run / "oracle.safetensors")
    # A shared module that is called through a function has no file of its layer: DeepSpeed leaves it as it was built
    # until the next step, on the ranks that saved it too. Its masters are compared.
    unsaved = {k for k in lived if k.startswith("live/tied_modules.")} if case == "pipe" else set()
    return differences(*({k: t for k, t in each.items() if k not in unsaved} for each in (live, lived)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--trainer", help="a Python that has DeepSpeed; without it an environment is built")
    parser.add_argument("--only", action="append", help="CASE:STAGE:BEFORE:AFTER")
    given = parser.parse_args()
    from converter.errors import ConvertError
    from run_zero_matrix import DEFAULT, trainer

    python = given.trainer or trainer(DEFAULT)
    asked = [(c, int(s), int(n), int(m)) for c, s, n, m in (w.split(":") for w in given.only or ())]
    wrong = 0
    for each in asked or TRIES:
        try:
            found = faults(python, given.out, *each)
        except (ConvertError, subprocess.SubprocessError) as error:
            found = [str(error)]
        wrong += bool(found)
        print(*each, "; ".join(found[:3]) if found else "equal", flush=True)
    print(f"{len(asked or TRIES)} loaded, {wrong} differ")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
