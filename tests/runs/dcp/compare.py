"""A distributed checkpoint against what lived in memory when it was saved: bit by bit, by name, dtype and shape."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from converter.sources.dcp.source import SOURCE, adam_moments
from lived import facts, live, runs_in
from zero.compare import differences, evaluated

RUNS = Path(__file__).parent / "runs"
MOMENTS: tuple[Literal["exp_avg", "exp_avg_sq"], ...] = ("exp_avg", "exp_avg_sq")


def run_names(root: Path = RUNS) -> list[str]:
    """Every saved run."""
    return runs_in(root)


def faults(run: Path) -> list[str]:
    """Everything in which a gathered run differs from what lived: weights, buffers and both moments."""
    checkpoint = SOURCE.open(run, asked=run.name)
    wanted = live(run)
    if facts(run)["layout"] == "accelerate-adapter":  # frozen weights were not saved
        wanted = {n: t for n, t in wanted.items() if ".lora_" in n or ".modules_to_save." in n}
    found = differences(evaluated(checkpoint.tensors), wanted)
    for which in MOMENTS:
        wanted = live(run, which)
        if wanted:
            got = evaluated(adam_moments(run, which=which))
            found += [f"{which}: {d}" for d in differences(got, wanted)]
    return found
