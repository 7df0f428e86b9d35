"""A checkpoint that DeepSpeed saved against what lived in memory: bit by bit, by name, dtype and shape."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from converter.core.checkpoint import Checkpoint
from converter.core.compute.evaluate import Evaluator
from converter.core.files.reading import InputFiles
from converter.core.tensors.nodes import LazyTensor
from converter.sources.deepspeed import source as deepspeed
from converter.sources.deepspeed import universal as deepspeed_universal
from converter.sources.deepspeed.files import tags_in, universal_in
from converter.sources.deepspeed.source import DeepSpeedSource
from lived import facts, live, runs_in

STATES = ("master", "exp_avg", "exp_avg_sq")
RUNS = Path(__file__).parent / "runs"


def run_names(root: Path = RUNS) -> list[str]:
    """Every saved run."""
    return runs_in(root)


def source_of(run: Path) -> DeepSpeedSource:
    """The source that reads a run: of ranks' files, or of a universal checkpoint."""
    return deepspeed_universal.SOURCE if universal_in(run) and not tags_in(run) else deepspeed.SOURCE


def evaluated(tensors: Mapping[str, LazyTensor]) -> dict[str, torch.Tensor]:
    """Lazy tensors as torch's."""
    with InputFiles({}) as files:
        return {n: Evaluator(files).evaluate(t, {}) for n, t in tensors.items()}


def differences(got: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> list[str]:
    """What differs, in words; nothing where both are equal bit by bit."""
    found = [f"missing {n}" for n in wanted if n not in got] + [f"unexpected {n}" for n in got if n not in wanted]
    for name in [n for n in got if n in wanted]:
        a, b = got[name], wanted[name]
        same = a.dtype == b.dtype and a.shape == b.shape
        if not same or not a.reshape(-1).view(torch.uint8).equal(b.reshape(-1).view(torch.uint8)):
            found.append(f"{name}: {a.dtype} {tuple(a.shape)} differs from {b.dtype} {tuple(b.shape)}")
    return found


def faults(run: Path) -> list[str]:
    """Everything in which a gathered run differs from what lived: weights, buffers, masters, both moments."""
    told = facts(run)
    checkpoint = source_of(run).open(run, asked=run.name)
    wanted = live(run)
    if told["case"] == "lora-lean":  # frozen parameters were excluded when it was saved
        wanted = {n: t for n, t in wanted.items() if n in (checkpoint.trained or ())}
        empty = [n for n, t in checkpoint.tensors.items() if n not in wanted and t.info.shape != (0,)]
        assert not empty, f"no file has these: {empty}"
        trained = checkpoint.trained or frozenset()
        checkpoint = checkpoint.replace(tensors={n: t for n, t in checkpoint.tensors.items() if n in trained})
    found = [f"live: {d}" for d in differences(evaluated(checkpoint.tensors), wanted)]
    return found + [d for kind in STATES for d in state_faults(run, checkpoint, kind)]


def state_faults(run: Path, checkpoint: Checkpoint, kind: str) -> list[str]:
    """Differences of the masters, or of a moment; DeepSpeed keeps no masters by name without ZeRO."""
    source = source_of(run)
    aliases = {n for group in checkpoint.ties for n in group[1:]}
    wanted = live(run, kind)
    if kind == "master":
        if facts(run)["stage"] == 0:
            return []
        masters = source.open_masters(run, asked=run.name)
        tensors = {n: t for n, t in masters.tensors.items() if n in (masters.trained or ())}
    else:
        wanted = {n: t for n, t in wanted.items() if n not in aliases}
        which: Any = kind
        tensors = source.adam_moments(run, which=which, allow=["moments-order"])
    return [f"{kind}: {d}" for d in differences(evaluated(tensors), wanted)]
