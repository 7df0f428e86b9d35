"""Which of a distributed checkpoint's entries are the model, and what the others are.

torch writes whatever nest of dictionaries a trainer gave it, and keeps the path to each leaf. A model's state is one
dictionary, so its tensors share all of the path but the last key, which is the name in memory. An optimizer's state has
`param_groups` beside `state`, nested or as prefixes of flat names.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from converter.sources.dcp.metadata import Metadata
from converter.text import fold, show

Moment = Literal["exp_avg", "exp_avg_sq"]

# Where several dictionaries hold matrices, these words say which is the model.
_MODEL_WORDS = frozenset({"model", "module", "state_dict", "model_state_dict", "weights"})
_OPTIMIZER_WORD = re.compile(r"(?:optim|optimizer|optimizers|optimizer_states?|opt)(?:_\d+)?", re.ASCII)
_GROUPS = re.compile(r"(?P<root>(?:.*?\.)??)param_groups(?:\.|$)", re.DOTALL)
# Folders of accelerate: what is in them was saved as {"model": ...}.
_ACCELERATE = re.compile(r"pytorch_model_fsdp_\d+", re.ASCII)


@dataclass(frozen=True)
class SortedEntries:
    """A checkpoint's entries, sorted.

    Attributes:
        model: names in memory, mapped to keys.
        where: the path to the model, as a user would write it; empty for the top.
        extra: entries of the model that are no tensors.
        optimizer: what optimizers' keys begin with, and how many there are.
        others: keys of everything else.
    """

    model: Mapping[str, str]
    where: str
    extra: tuple[str, ...]
    optimizer: Mapping[str, int]
    others: tuple[str, ...]


def sort_entries(metadata: Metadata) -> SortedEntries:
    """The model among the entries.

    Raises:
        Refused: there is none (`dcp-no-model`, `dcp-optimizer-alone`), or one of several is to be chosen
            (`dcp-several-models`).
    """
    roots = optimizer_roots(metadata)
    taken = {k: r for k in (*metadata.tensors, *metadata.blobs) if (r := _optimizer_of(k, roots, metadata)) is not None}
    groups: dict[tuple[str, ...], list[str]] = {}
    for key in metadata.tensors:
        if key not in taken:
            groups.setdefault(_container(key, metadata), []).append(key)
    chosen = _choose(groups, metadata, bool(taken))
    model = {_path(k, metadata)[-1]: k for k in groups[chosen]}
    blobs = [k for k in metadata.blobs if k not in taken]
    extra = tuple(k for k in blobs if chosen and _container(k, metadata)[: len(chosen)] == chosen)
    others = [k for g, keys in groups.items() if g != chosen for k in keys] + [k for k in blobs if k not in extra]
    return SortedEntries(model, ".".join(chosen), extra, Counter(taken.values()), tuple(others))


def _choose(groups: Mapping[tuple[str, ...], list[str]], metadata: Metadata, has_optimizer: bool) -> tuple[str, ...]:
    if not groups:
        code, text = ("dcp-optimizer-alone", "only an optimizer's state is here") if has_optimizer else (None, "")
        raise metadata.refuse(
            code or "dcp-no-model",
            text or "no tensors are here",
            next="name the folder of the model, which lies beside it: pytorch_model_fsdp_0, or another of the run",
        )
    if len(groups) == 1:
        return next(iter(groups))
    large = [g for g, keys in groups.items() if any(_is_matrix(k, metadata) for k in keys)]
    named = [g for g in large if g and g[-1] in _MODEL_WORDS]
    for found in (named, large):
        if len(found) == 1:
            return found[0]
    listed = fold([show(".".join(g) or "(the top)") for g in (named or large or groups)])
    raise metadata.refuse(
        "dcp-several-models",
        f"several dictionaries could be the model: {listed}; none is named `model` alone",
        next="save the one that is wanted by itself, or name it `model`",
    )


def _is_matrix(key: str, metadata: Metadata) -> bool:
    entry = metadata.tensors[key]
    return len(entry.shape) > 1 and entry.dtype is not None and entry.dtype.is_float


def _path(key: str, metadata: Metadata) -> tuple[str, ...]:
    path = metadata.path(key)
    if len(path) == 1 and key not in metadata.paths and _ACCELERATE.fullmatch(metadata.folder.name):
        head, dot, rest = key.partition(".")
        return (head, rest) if dot and head == "model" else path
    return path


def _container(key: str, metadata: Metadata) -> tuple[str, ...]:
    return _path(key, metadata)[:-1]


def optimizer_roots(metadata: Metadata) -> tuple[str, ...]:
    """What optimizers' keys begin with: `optim.`, `app.optimizer.`; empty where the checkpoint is one's state."""
    found: dict[str, None] = {}
    for key in (*metadata.tensors, *metadata.blobs):
        match = _GROUPS.match(key)
        if match is not None:
            found[match["root"]] = None
        container = metadata.path(key)[:-1]
        for depth, word in enumerate(container):
            if _OPTIMIZER_WORD.fullmatch(word):
                found[".".join(container[: depth + 1]) + "."] = None
                break
    return tuple(found)


def _optimizer_of(key: str, roots: Iterable[str], metadata: Metadata) -> str | None:
    """The root of the optimizer that an entry belongs to."""
    if any(_OPTIMIZER_WORD.fullmatch(word) for word in _container(key, metadata)):
        return max((r for r in roots if key.startswith(r)), key=len, default="")
    return next((r for r in roots if key.startswith((f"{r}state.", f"{r}param_groups"))), None)


def optimizer_states(metadata: Metadata) -> dict[str, dict[str, str]]:
    """Keys of the optimizer's tensors: by parameter name, then by what they are (`exp_avg`, `step`).

    Parameters that the optimizer only numbers are not among them: nothing says which is which.
    """
    found: dict[str, dict[str, str]] = {}
    for root in optimizer_roots(metadata):
        start = f"{root}state."
        for key in metadata.tensors:
            name, dot, leaf = key.removeprefix(start).rpartition(".")
            if key.startswith(start) and dot and not name.isdecimal():
                found.setdefault(name, {})[leaf] = key
    return found


def reasons(entries: SortedEntries) -> dict[str, str]:
    """What is not taken, and why; an optimizer's entries as one."""
    found = dict.fromkeys(entries.extra, "it is not a tensor, but state of a module's own")
    found |= dict.fromkeys(entries.others, "no part of the model: it lies beside it in the trainer's state")
    for root, count in entries.optimizer.items():
        found[f"{root}*"] = f"the optimizer's state, {count} entries: no part of a model"
    return found
