"""Files of torch.save as torch itself loads them, classes of DeepSpeed as bags; and what differs between two."""

from __future__ import annotations

import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch


class Bag:
    """An object of a class that isn't installed: its name, what it was made from, what was set on it."""

    def __init__(self, name: str, args: tuple[Any, ...]) -> None:
        self.name, self.args, self.state = name, args, None

    def __setstate__(self, state: Any) -> None:
        self.state = state


def loaded(path: Path) -> Any:
    """The value in a file."""
    return torch.load(path, weights_only=False, pickle_module=_with_bags(), map_location="cpu")  # noqa: TID251


def _with_bags() -> Any:
    import pickle  # noqa: TID251

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if not module.startswith("deepspeed"):
                return super().find_class(module, name)

            class Named(Bag):
                def __new__(cls, *args: Any) -> Any:
                    made = object.__new__(cls)
                    made.__init__(f"{module}.{name}", args)  # type: ignore[misc]
                    return made

                def __init__(self, *args: Any) -> None:
                    if not hasattr(self, "name"):
                        super().__init__(*args)

            return Named

    return types.SimpleNamespace(Unpickler=Unpickler, load=pickle.load, __name__="bags")


def differences(a: Any, b: Any, at: str = "") -> Iterator[str]:
    """Where two trees differ: kinds, keys and their order, values, tensors bit by bit."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape and a.requires_grad == b.requires_grad
        if not same or not torch.equal(_bits(a), _bits(b)):
            yield f"{at}: {a.dtype} {list(a.shape)} and {b.dtype} {list(b.shape)}"
    elif isinstance(a, Bag) and isinstance(b, Bag):
        yield from differences((a.name, a.args, a.state), (b.name, b.args, b.state), at)
    elif type(a) is not type(b):
        yield f"{at}: {type(a).__name__} and {type(b).__name__}"
    elif isinstance(a, dict):
        if list(a) != list(b):
            yield f"{at}: keys {[k for k in a if k not in b]} and {[k for k in b if k not in a]}, or their order"
        yield from differences(getattr(a, "_metadata", None), getattr(b, "_metadata", None), f"{at}._metadata")
        for key in a.keys() & b.keys():
            yield from differences(a[key], b[key], f"{at}.{key}")
    elif isinstance(a, list | tuple):
        if len(a) != len(b):
            yield f"{at}: {len(a)} and {len(b)} items"
        for index, pair in enumerate(zip(a, b, strict=False)):
            yield from differences(*pair, f"{at}[{index}]")
    elif a != b:
        yield f"{at}: {a!r} and {b!r}"


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
