"""A checkpoint that verl saved against what lived in memory: bit by bit, by name, dtype and shape."""

from __future__ import annotations

from pathlib import Path

import torch

import lived
from converter.sources.verl.source import SOURCE
from lived import facts, runs_in
from zero.compare import differences, evaluated

RUNS = Path(__file__).parent / "runs"


def run_names(root: Path = RUNS) -> list[str]:
    """Every saved run."""
    return runs_in(root)


def live(run: Path, kind: str = "live") -> dict[str, torch.Tensor]:
    """What lived in memory: `live` parameters and buffers, `exp_avg`, `exp_avg_sq`."""
    found = lived.live(run, kind)
    if facts(run)["case"] == "lora-only":  # the rest was not saved
        found = {n: t for n, t in found.items() if ".lora_" in n}
    return found


def weight_faults(run: Path) -> list[str]:
    """Everything in which gathered weights differ from what lived."""
    return differences(evaluated(SOURCE.open(run, asked=run.name).tensors), live(run))


def moment_faults(run: Path) -> list[str]:
    """The same of both moments; of names that share a parameter one has them."""
    found = []
    again = {n for group in SOURCE.open(run, asked=run.name).ties for n in group[1:]}
    for kind in ("exp_avg", "exp_avg_sq"):
        wanted = {n: t for n, t in live(run, kind).items() if n not in again}
        found += [f"{kind}: {d}" for d in differences(evaluated(SOURCE.adam_moments(run, which=kind)), wanted)]  # type: ignore[arg-type]
    return found
