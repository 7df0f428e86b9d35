"""Files of ranks in Megatron's old format, changed: its own classes, which are not installed here, become words."""

from __future__ import annotations

import pickle  # noqa: TID251
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return str if module.startswith("megatron.") else super().find_class(module, name)


def edit_rank(folder: Path, rank: str, change: Callable[[Any], object]) -> None:
    """Change what one rank saved, `01_000` say."""
    edit_state(folder / f"mp_rank_{rank}" / "model_optim_rng.pt", change)


def edit_state(path: Path, change: Callable[[Any], object]) -> None:
    """Change what a file holds, `common.pt` say."""
    reading = types.ModuleType("reading")
    vars(reading).update(vars(pickle), Unpickler=_Unpickler)
    state = torch.load(path, weights_only=False, pickle_module=reading)  # noqa: TID251
    change(state)
    torch.save(state, path)
