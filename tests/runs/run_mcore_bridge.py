"""Lets Megatron-Bridge fill GPTModels of megatron-core on CPU, and compares its own export with what is gathered.

    python tests/runs/run_mcore_bridge.py OUT --trainer PYTHON   a Python that has megatron-core and megatron-bridge
    python tests/runs/run_mcore_bridge.py OUT --compare-only     what was saved before, again

One rank, TP 2 and PP 2. Of each model: whether `gather` writes the model that the bridge was given, and whether the
bridge exports it, bit by bit. Megatron-Bridge, triton and omegaconf install beside megatron-core with `--no-deps`.
Exits with 1 where `gather` differs from the model.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
from pathlib import Path

from run_mcore_matrix import HERE

CASES = (
    "llama", "mistral", "qwen2", "qwen2-tied", "qwen3", "qwen3-tied", "qwen3_moe", "gemma", "gemma2", "gemma3_text",
    "gpt_oss",
)  # fmt: skip
_NOT_SPLIT = frozenset({("tp2", "gpt_oss")})
"""Megatron splits no expert that has biases."""
SIZES = {"one": (), "tp2": ("--tp", "2"), "pp2": ("--pp", "2")}


def differences(case: Path) -> tuple[list[str], list[str]]:
    """In what the gathered model and the bridge's export are not the model that the bridge was given."""
    from safetensors.torch import load_file

    from lived import facts
    from mcore.compare import written
    from oracle.command import run
    from zero.compare import differences as compared

    wanted = load_file(case / "hf" / "model.safetensors")
    target = case.with_suffix(".gathered")
    done = run("gather", case, target, "--base", case / "hf", "--overwrite")
    ours = compared(written(target), wanted) if not done.code else [f"exit {done.code}: {done.err.strip()}"]
    shutil.rmtree(target, ignore_errors=True)
    why = facts(case)["no_export"]
    return ours, [why] if why else compared(load_file(case / "exported.safetensors"), wanted)


def main() -> None:
    """Save and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--trainer", default="python")
    parser.add_argument("--compare-only", action="store_true")
    asked = parser.parse_args()
    is_wrong = False
    for size, given in SIZES.items():
        cases = [c for c in CASES if (size, c) not in _NOT_SPLIT]
        if not asked.compare_only:
            command = [asked.trainer, str(HERE / "mcore" / "bridge.py"), str(asked.out / size), *given]
            with (asked.out / f"{size}.log").open("w") as log:
                subprocess.run([*command, "--cases", *cases], stdout=log, stderr=log, check=False)
        for name in cases:
            case = asked.out / size / name
            if not (case / "fixture.json").is_file():
                print(f"{size:4} {name:12} not saved", flush=True)
                is_wrong = True
                continue
            ours, theirs = differences(case)
            is_wrong |= bool(ours)
            words = ["; ".join(found[:3]) if found else "equal" for found in (ours, theirs)]
            print(f"{size:4} {name:12} gather: {words[0]:8} bridge: {words[1]}", flush=True)
    raise SystemExit(1 if is_wrong else 0)


if __name__ == "__main__":
    main()
