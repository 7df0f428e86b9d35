"""Shards of real runs, edited."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


class Stub:
    """Stands for what DeepSpeed pickled; becomes a number."""

    args: tuple[Any, ...] = ()

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __reduce__(self) -> Any:
        return int, self.args[:1]


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    """Change a file with torch itself; what DeepSpeed pickled beside tensors is replaced by numbers."""
    state = torch.load(path, weights_only=False, pickle_module=_plain())  # noqa: TID251
    change(state)
    torch.save(state, path)


def _plain() -> Any:
    import pickle  # noqa: TID251
    import types

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            return Stub if module.startswith("deepspeed") else super().find_class(module, name)

    return types.SimpleNamespace(Unpickler=Unpickler, load=pickle.load, __name__="plain")
