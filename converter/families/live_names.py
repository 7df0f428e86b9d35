"""Where each tensor of a checkpoint goes in a model that transformers built: its names in memory, stacks included.

A name is taken as it is where the model has it. Else it is renamed as transformers renames it on loading, with or
without the backbone's prefix; experts that a load stacks go to their stretch of the stack; and one prefix that all
other names lack is a wrapper's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from converter.core.tensors.dtypes import DType, TensorInfo
from converter.core.tensors.nodes import stored
from converter.families.disk_names import taken_apart
from converter.families.memory_names import Architecture, architecture, auto_class
from converter.families.words import OLD_BUFFERS

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Place:
    """The live tensor that a stored one goes to, and the element where it begins, counted row-major."""

    name: str
    start: int
    shape: Shape


@dataclass
class Places:
    """Where stored tensors go.

    Attributes:
        found: by the stored name.
        unexpected: stored names that the model has no place for.
        changed: stored names whose values transformers changes on loading, otherwise than by stacking.
    """

    found: dict[str, Place] = field(default_factory=dict)
    unexpected: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)


def find_places(
    names: Iterable[str], live: Mapping[str, Shape], *, classes: Sequence[str], prefix: str, config: Mapping[str, Any]
) -> Places:
    """The place of each stored name in a live model.

    Args:
        live: every name of the model, with its shape.
        classes: names of the model's class and of those that it derives from.
        prefix: what the model calls its backbone (`base_model_prefix`); empty where it has none.
        config: the model's own.
    """
    built = _built(classes, config)
    prefixes = [p for p in dict.fromkeys((prefix, "" if built is None else built.prefix)) if p]
    stacks = _stacks(live, built)
    result = Places()
    lacking: dict[str, str] = {}
    met: set[int] = set()
    for name in sorted(names, key=_natural):
        if name in live:
            result.found[name] = Place(name, 0, live[name])
            continue
        if (stack := _spelling(name, stacks, prefixes)) is not None:
            result.found[name] = stacks[stack]
            continue
        memory, transform = (name, None) if built is None else built.in_memory(name, met)
        spelled = _spelling(memory, live, prefixes)
        if transform is not None:
            result.changed.append(name)
        elif spelled is not None:
            result.found[name] = Place(spelled, 0, live[spelled])
        elif not name.endswith(OLD_BUFFERS):
            lacking[name] = memory
    _behind_a_wrapper(lacking, live, result)
    return result


def _built(classes: Sequence[str], config: Mapping[str, Any]) -> Architecture | None:
    """The class as transformers' table has it; of a class that is not in it, by the config."""
    listed = config.get("architectures")
    kind = str(config.get("model_type"))
    named = [*classes, *(listed if isinstance(listed, list) else []), auto_class("CAUSAL_LM", kind)]
    return next((found for name in named if (found := architecture(name, config)) is not None), None)


def _stacks(live: Mapping[str, Shape], built: Architecture | None) -> dict[str, Place]:
    """Where each tensor goes that a load stacks, by its name on disk."""
    if built is None:
        return {}
    found: dict[str, Place] = {}
    for name, shape in live.items():
        # A byte an element: the offset of a part is then the number of its first element.
        parts = taken_apart(name, stored(TensorInfo(DType.U8, shape), "", 0), built)
        found |= {d: Place(name, getattr(part, "offset", 0), part.info.shape) for d, part in parts.items()}
    return found


def _spelling(name: str, live: Mapping[str, object], prefixes: Sequence[str]) -> str | None:
    """The name as the model has it: with or without the backbone's prefix."""
    spellings = [name, *(name.removeprefix(f"{p}.") for p in prefixes), *(f"{p}.{name}" for p in prefixes)]
    return next((s for s in spellings if s in live), None)


def _behind_a_wrapper(lacking: Mapping[str, str], live: Mapping[str, Shape], result: Places) -> None:
    """Names that one prefix leads to: of a module that holds the model. Others are unexpected."""
    prefixes: dict[str, dict[str, str]] = {}
    for name, memory in lacking.items():
        for there in live:
            if there.endswith(f".{memory}"):
                prefixes.setdefault(there.removesuffix(memory), {})[name] = there
    best = max(prefixes.values(), key=len, default={})
    taken = {p.name for p in result.found.values()}
    for name in lacking:
        if name not in best or best[name] in taken:
            result.unexpected.append(name)
        else:
            result.found[name] = Place(best[name], 0, live[best[name]])


def _natural(name: str) -> list[tuple[int, int | str]]:
    """Numbers by their value: groups of names begin with the first."""
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in name.split(".")]
