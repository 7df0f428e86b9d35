"""What all probes share: arguments, stand-ins for packages that play no part in loading, digests, the report.

A probe is a script that is run by the trainer's own Python. It imports the trainer and nothing of rlhf-convert, loads a
folder with the trainer's own loader on the CPU, and writes what came out as JSON:

    PY probe_openrlhf.py DIR --role reward|critic --inputs INPUTS.json --out OUT.json

    trainer   versions of the trainer, transformers and torch, the class of the model
    error     type and text of what the loader raised; then nothing follows but `said`
    said      what the loader said on its way: log records, warnings
    head      head tensors by their name in the model: dtype, shape, sha256 of the bytes, values if there are few
    backbone  every other parameter and buffer, likewise; names as in the model below the trainer's wrapper
    rewards   batch name mapped to one number a sequence (role reward)
    values    batch name mapped to one row of numbers a sequence and the columns they belong to (role critic)

Tensors are digested as the loader left them, in the dtype that it loaded; then the model is made fp32, and rewards and
values are computed.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import json
import logging
import sys
import types
import typing
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

FEW_VALUES = 1 << 16
"""A head tensor with no more elements than this is reported with its values."""


@dataclass
class Loaded:
    """A model as its trainer's loader left it.

    Attributes:
        model: the module, wrapper included.
        head: names of the head's parameters in `model.state_dict()`.
        rewards: from ids and mask, `[n, t]` each, to `[n]`.
        values: from ids and mask to `[n, len(columns)]` and the columns.
        canonical: a name in the state dict to the backbone's own name, or None for what is not a weight of a file.
        facts: more to report.
    """

    model: Any
    head: tuple[str, ...]
    rewards: Callable[[Any, Any], Any] | None = None
    values: Callable[[Any, Any], tuple[Any, list[int]]] | None = None
    canonical: Callable[[str], str | None] = field(default=lambda name: name)
    state: dict[str, Any] | None = None
    facts: dict[str, Any] = field(default_factory=dict)


# Stand-ins


class _Nothing(type):
    """A class whose attributes are such classes, too; made, called or used as a decorator it gives nothing of use."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _nothing(name)


def _nothing(name: str) -> Any:
    return _Nothing(name, (), {"__init__": lambda self, *a, **k: None, "__call__": lambda self, *a, **k: self})


class StandIn(types.ModuleType):
    """A module of which anything may be imported."""

    __path__: typing.ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = _nothing(name)
        setattr(self, name, made)
        return made


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds a stand-in for the given top-level packages, and for whatever is imported from inside them."""

    def __init__(self, roots: frozenset[str]) -> None:
        self.roots = roots

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.partition(".")[0] not in self.roots:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: Any) -> types.ModuleType:
        return StandIn(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def stand_in_for(*names: str) -> list[str]:
    """Let packages that are not installed be imported all the same; returns those that had to be stood in for.

    `importlib.util.find_spec`, by which libraries ask what is installed, goes on saying that they are not.
    """
    ask = importlib.util.find_spec
    missing = [name for name in names if ask(name) is None]
    if missing:
        sys.meta_path.append(_Finder(frozenset(missing)))

        def find_spec(name: str, package: str | None = None) -> Any:
            return None if name.partition(".")[0] in missing else ask(name, package)

        importlib.util.find_spec = find_spec
    return missing


# Running


def run(trainer: str, load: Callable[[argparse.Namespace], Loaded], *, roles: tuple[str, ...]) -> None:
    """Parse the arguments, load, report, exit: 0 with a report, even if the loader refused."""
    parser = argparse.ArgumentParser(description=f"what {trainer} loads from a folder")
    parser.add_argument("folder")
    parser.add_argument("--role", required=True, choices=roles)
    parser.add_argument("--inputs", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--head-name", help="the head's name, where the trainer has a flag for it")
    parser.add_argument("--dtype", default="float32", help="dtype to load in, where the trainer lets choose")
    asked = parser.parse_args()
    report: dict[str, Any] = {"probe": 1, "role": asked.role, "trainer": _versions(trainer)}
    with _listening() as said:
        try:
            loaded = load(asked)
            report["trainer"]["class"] = type(loaded.model).__name__
            report["facts"] = loaded.facts
            report |= _tensors(loaded)
            report |= _numbers(loaded, asked)
        except Exception as error:  # whatever the trainer raises is what the user would see
            report["error"] = {"type": type(error).__name__, "text": str(error)}
    report["said"] = said
    with open(asked.out, "w", encoding="utf-8") as file:
        json.dump(report, file)


class _Records(logging.Handler):
    def __init__(self, said: list[str]) -> None:
        super().__init__(logging.WARNING)
        self.said = said

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


@contextlib.contextmanager
def _listening() -> Iterator[list[str]]:
    """What is logged at WARNING or above meanwhile, and Python's warnings."""
    said: list[str] = []
    handler = _Records(said)
    loggers = [logging.getLogger(name) for name in ("", "transformers")]  # transformers' logger doesn't propagate
    for each in loggers:
        each.addHandler(handler)
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *rest, **more: said.append(str(message))
        try:
            yield said
        finally:
            for each in loggers:
                each.removeHandler(handler)


def _versions(trainer: str) -> dict[str, Any]:
    found: dict[str, Any] = {"name": trainer}
    for package in (trainer, "transformers", "peft", "trl", "torch"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _tensors(loaded: Loaded) -> dict[str, Any]:
    state = loaded.state if loaded.state is not None else loaded.model.state_dict()
    head, backbone = {}, {}
    for name, tensor in state.items():
        if name in loaded.head:
            head[name] = _described(tensor, values=True)
        elif (own := loaded.canonical(name)) is not None:
            backbone[own] = _described(tensor, values=False)
    return {"head": head, "backbone": backbone}


def _described(tensor: Any, *, values: bool) -> dict[str, Any]:
    """Dtype, shape and sha256 of a tensor's bytes, row-major and little-endian."""
    import torch

    plain = tensor.detach().cpu().contiguous()
    raw = plain.reshape(-1).view(torch.uint8).numpy().tobytes() if plain.numel() else b""
    shown = {
        "dtype": str(plain.dtype).removeprefix("torch."),
        "shape": list(plain.shape),
        "sha256": hashlib.sha256(raw).hexdigest(),
    }
    if values and plain.numel() <= FEW_VALUES:
        shown["values"] = plain.double().reshape(-1).tolist()
    return shown


def _numbers(loaded: Loaded, asked: argparse.Namespace) -> dict[str, Any]:
    import torch

    with open(asked.inputs, encoding="utf-8") as file:
        batches = json.load(file)["batches"]
    loaded.model.float().eval()
    out: dict[str, Any] = {}
    with torch.no_grad():
        for name, batch in batches.items():
            ids, mask = torch.tensor(batch["input_ids"]), torch.tensor(batch["attention_mask"])
            if asked.role == "reward" and loaded.rewards is not None:
                out.setdefault("rewards", {})[name] = loaded.rewards(ids, mask).double().reshape(-1).tolist()
            if asked.role == "critic" and loaded.values is not None:
                values, columns = loaded.values(ids, mask)
                found = {"columns": columns, "rows": values.double().tolist()}
                out.setdefault("values", {})[name] = found
    return out


def positions(mask: Any) -> Any:
    """Position ids of a padded batch, as PPO trainers make them."""
    ids = mask.long().cumsum(-1) - 1
    return ids.masked_fill(mask == 0, 1)


def last_attended(values: Any, mask: Any) -> Any:
    """`[n, t]` at each row's last attended column."""
    at = mask.size(1) - 1 - mask.long().fliplr().argmax(dim=1, keepdim=True)
    return values.gather(1, at).squeeze(1)


def drop_prefix(name: str, prefixes: Iterable[str]) -> str:
    """`name` without the first of `prefixes` that it begins with."""
    return next((name.removeprefix(p) for p in prefixes if name.startswith(p)), name)
