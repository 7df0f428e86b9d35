"""Runs that `make.py` saved, copied to where a test may break them further, and what lived in memory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

RUNS = Path(__file__).parent / "runs"
PREFIX = "base_model.model."
Tensors = dict[str, torch.Tensor]


def copied(tmp_path: Path, name: str, *, shards: bool = True) -> Path:
    """A run's folder; without DeepSpeed's own folders if so asked."""
    folder = Path(shutil.copytree(RUNS / name, tmp_path / name))
    if not shards:
        drop_shards(folder)
    return folder


def drop_shards(folder: Path) -> None:
    for place in folder.glob("checkpoint-*"):
        (place / "latest").unlink()
        for tag in place.glob("global_step*"):
            shutil.rmtree(tag)


def live(name: str, step: int = 2) -> Tensors:
    """Parameters as they lived, gathered during training, by their names in memory."""
    return load_file(RUNS / name / f"oracle-{step}.safetensors")


def as_adapter(held: Tensors) -> Tensors:
    """What PEFT would have saved of it, had it been gathered."""
    found = {n: t for n, t in held.items() if ".lora_" in n or ".modules_to_save." in n}
    return {n.replace(".default", "").replace(".modules_to_save", ""): t for n, t in found.items()}


def saved(folder: Path) -> Tensors:
    """Every tensor of an output."""
    return {n: t for file in sorted(folder.glob("*.safetensors")) for n, t in load_file(file).items()}


def rewrite(file: Path, *, empty: Iterable[str] = (), drop: Iterable[str] = (), **changed: Any) -> None:
    """Break or fix a file of weights: some tensors emptied as ZeRO-3 leaves them, some gone, some others."""
    held = load_file(file) | changed.pop("put", {})
    held |= {n: torch.empty(0, dtype=held[n].dtype) for n in empty}
    file.unlink()
    save_file({n: t.contiguous() for n, t in held.items() if n not in set(drop)}, file, metadata={"format": "pt"})


def receipt(out: Path) -> dict[str, Any]:
    """What the output says of itself."""
    found: dict[str, Any] = json.loads((out / "rlhf-convert.json").read_text())
    return found
