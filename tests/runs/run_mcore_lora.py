"""Saves LoRA of Megatron-Bridge's and ms-swift's own modules, and compares what is gathered with what was put in. Slow.

    python tests/runs/run_mcore_lora.py OUT --trainer PYTHON   a Python that has megatron-core and megatron-bridge
    python tests/runs/run_mcore_lora.py OUT --trainer PYTHON --swift    one that has mcore-bridge and ms-swift
    python tests/runs/run_mcore_lora.py OUT --compare-only     what was saved before, again

Adapters alone and with their model, TP 1 and 2: every factor of the PEFT adapter must be the one that was put in, bit
by bit, and the merged model what torch computes of them. Exits with 1 on a difference.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
from pathlib import Path

from run_mcore_matrix import HERE

SAVES = {
    f"{what}-tp{tp}": ["--tp", str(tp), *more]
    for tp in (1, 2)
    for what, more in (("alone", []), ("whole", ["--whole"]))
}
OF_SWIFT = {f"swift-tp{tp}": ["--tp", str(tp), "--swift"] for tp in (1, 2)}
SCALE = 8 / 4
"""alpha over rank, of `mcore/lora.py`."""


def differences(run_folder: Path) -> list[str]:
    """Everything in which an adapter, or the merged model, differs from what was put in."""
    import torch
    from safetensors.torch import load_file

    from mcore.compare import written
    from oracle.command import run

    target = run_folder.with_suffix(".gathered")
    found: list[str] = []
    factors = load_file(run_folder / "adapter.safetensors")
    done = run("gather", run_folder, target, "--base", run_folder / "hf", "--overwrite")
    if done.code:
        return [done.err.strip()]
    made = written(target)
    found += [f"adapter: {n}" for n in sorted(made.keys() ^ factors.keys())]
    found += [n for n in made.keys() & factors.keys() if not torch.equal(made[n], factors[n])]
    done = run("gather", run_folder, target, "--base", run_folder / "hf", "--emit", "merged", "--overwrite")
    if done.code:
        return [*found, done.err.strip()]
    wanted = load_file(run_folder / "hf" / "model.safetensors")
    for name in [n for n in factors if ".lora_A." in n]:
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        update = factors[name.replace("lora_A", "lora_B")].float() @ factors[name].float()
        wanted[f"{module}.weight"] = (wanted[f"{module}.weight"].float() + SCALE * update).bfloat16()
    made = written(target)
    found += [f"merged: {n}" for n in sorted(made.keys() ^ wanted.keys())]
    for name in made.keys() & wanted.keys():
        if not torch.allclose(made[name].float(), wanted[name].float(), rtol=2**-7, atol=0):
            found.append(f"{name} is not the merged one")
    shutil.rmtree(target)
    return found


def main() -> None:
    """Save and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--trainer")
    parser.add_argument("--swift", action="store_true")
    parser.add_argument("--compare-only", action="store_true")
    asked = parser.parse_args()
    is_wrong = False
    for name, given in (OF_SWIFT if asked.swift else SAVES).items():
        if not asked.compare_only:
            command = [asked.trainer or "python", str(HERE / "mcore" / "lora.py"), str(asked.out / name), *given]
            subprocess.run(command, check=True)
        found = differences(asked.out / name) if (asked.out / name / "hf").is_dir() else ["not saved"]
        is_wrong |= bool(found)
        print(f"{name:16} {'; '.join(found[:5]) if found else 'equal'}", flush=True)
    raise SystemExit(1 if is_wrong else 0)


if __name__ == "__main__":
    main()
