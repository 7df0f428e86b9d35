"""What a stored run says of itself, and what lived in its trainer's memory when it was saved."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file


def runs_in(root: Path) -> list[str]:
    """Names of the saved runs below a folder."""
    return sorted(p.parent.name for p in root.glob("*/fixture.json"))


def facts(run: Path) -> dict[str, Any]:
    """How a run was trained and saved."""
    found: dict[str, Any] = json.loads((run / "fixture.json").read_text())
    return found


def live(run: Path, kind: str = "live") -> dict[str, torch.Tensor]:
    """What lived in memory: `live` parameters and buffers, `master`, `exp_avg`, `exp_avg_sq`; not to be changed."""
    return {n.partition("/")[2]: t for n, t in _oracle(run).items() if n.startswith(kind + "/")}


@functools.lru_cache(maxsize=4)
def _oracle(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "oracle.safetensors")
