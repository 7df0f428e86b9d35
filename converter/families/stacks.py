"""Parameters that hold all experts of a layer, and the tensors on disk that each of them is made of.

Since version 5 transformers keeps the experts of a layer in stacks, `experts.gate_up_proj` `[experts, 2 * width,
hidden]` and `experts.down_proj`; most checkpoints hold them one by one, `experts.3.gate_proj.weight`, and some hold the
stacks. `memory_names` says which of a checkpoint's tensors become a part of which stack; here that is turned round, so
that an adapter over either form finds its tensors.

Source: `MergeModulelist` and `Concatenate` of
https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/core_model_loading.py
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from converter.core.tensors.dtypes import TensorInfo
from converter.families import memory_names
from converter.families.memory_names import Architecture
from converter.families.transforms import Transform

Shape = tuple[int, ...]

STACKING = "MergeModulelist"
"""The operation of a load that stacks modules along a new first dimension; `+Concatenate` lays several of them end to
end along the next one: so in every entry of the table."""

_OTHER_WAY = frozenset({"Transpose"})
"""Operations on a stack that is one tensor on disk too; its shape says whether the load changes it."""

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)", re.ASCII)
_PLAIN = (".weight", ".bias")


@dataclass(frozen=True)
class Part:
    """A tensor on disk as a part of a stack.

    Attributes:
        expert: which one; None where the tensor is the whole stack.
        start, stop: which rows of it.
    """

    disk: str
    expert: int | None
    start: int
    stop: int


@dataclass(frozen=True)
class Stack:
    """A parameter without a module of its own.

    Attributes:
        name: in memory.
        shape: `[experts, rows, columns]` as it is on disk, or of its parts put together; `[rows, columns]` of a
            parameter that isn't a stack.
        rows: the rows of an expert that have a name of their own one by one: `gate_proj`, `up_proj`.
        fault: why its parts are not the stack, in words.
        is_turned: a load may exchange rows and columns.
    """

    name: str
    shape: Shape
    parts: tuple[Part, ...]
    rows: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    fault: str = ""
    is_turned: bool = False

    @property
    def experts(self) -> int:
        """How many there are."""
        return self.shape[0] if len(self.shape) == 3 else 1

    @property
    def matrix(self) -> tuple[int, int]:
        """The shape of one expert's."""
        return self.shape[-2], self.shape[-1]


def find_stacks(built: Architecture | None, stored: Mapping[str, TensorInfo]) -> dict[str, Stack]:
    """The stacks of a base by their names in memory.

    Args:
        built: the class that says what a load makes of the names; None: they are taken as they are.
    """
    apart: dict[str, dict[str, dict[int, str]]] = {}
    whole: dict[str, tuple[str, bool]] = {}
    met: set[int] = set()
    for name in memory_names.sorted_names(stored):
        memory, transform = (name, None) if built is None else built.in_memory(name, met)
        one = one_of(name, built) if transform is not None else None
        if one is not None:
            apart.setdefault(memory, {}).setdefault(one.leaf, {})[one.expert] = name
        elif transform is not None and transform.operations not in _OTHER_WAY:
            continue
        elif not memory.endswith(_PLAIN) and len(stored[name].shape) in (2, 3):
            whole[memory] = (name, transform is not None)
    found = {memory: _put_together(memory, kinds, stored, built) for memory, kinds in apart.items()}
    for memory, (name, is_turned) in whole.items():
        info = stored[name]
        fault = "it is there one by one and as a stack" if memory in found else ""
        part = Part(name, None, 0, info.shape[-2])
        rows = _halves(memory, info.shape, built) if len(info.shape) == 3 else {}
        found[memory] = Stack(memory, info.shape, (part,), rows, fault, is_turned)
    return found


def made_otherwise(built: Architecture | None, stored: Iterable[str]) -> dict[str, str]:
    """Parameters that a load makes otherwise than by stacking, by name in memory, with what it does."""
    if built is None:
        return {}
    found = [built.in_memory(name) for name in stored]
    return {
        memory: transform.operations
        for memory, transform in found
        if transform is not None and STACKING not in transform.operations and transform.operations not in _OTHER_WAY
    }


@dataclass(frozen=True)
class One:
    """What a name says of a tensor that a load stacks: the stack, the expert, and the module's last name."""

    stack: str
    expert: int
    leaf: str


def one_of(name: str, built: Architecture | None) -> One | None:
    """The place in a stack of what has this name on disk; None where a load does not stack it."""
    memory, transform = (name, None) if built is None else built.in_memory(name)
    if built is None or transform is None or STACKING not in transform.operations:
        return None
    found = transform.found(built.renamed(name))
    number = None if found is None else _NUMBER.search(found[2][0])
    leaf = name.removesuffix(".weight").rpartition(".")[2]
    return None if number is None else One(memory, int(number[0]), leaf)


def _put_together(
    memory: str, kinds: Mapping[str, Mapping[int, str]], stored: Mapping[str, TensorInfo], built: Architecture | None
) -> Stack:
    """The stack that a load makes of modules, by their last names and numbers."""
    ordered = _order(memory, kinds, built)
    count = max(len(names) for names in kinds.values())
    shapes = {leaf: {stored[n].shape for n in kinds[leaf].values()} for leaf in ordered if leaf in kinds}
    fault = ""
    if len(shapes) != len(ordered):
        fault = f"the base has no {' and no '.join(leaf for leaf in ordered if leaf not in kinds)}"
    elif any(sorted(names) != list(range(count)) for names in kinds.values()):
        fault = "the numbers of its experts are not 0, 1, 2, ... for each part"
    elif any(len(each) != 1 or len(next(iter(each))) != 2 for each in shapes.values()):
        fault = "its experts differ in shape"
    elif len({next(iter(each))[1] for each in shapes.values()}) != 1:
        fault = "its parts differ in width"
    if fault:
        return Stack(memory, (0, 0, 0), (), fault=fault)
    rows: dict[str, tuple[int, int]] = {}
    height = width = 0
    for leaf in ordered:
        own, width = next(iter(shapes[leaf]))
        rows[leaf] = (height, height + own)
        height += own
    parts = [Part(kinds[leaf][e], e, *rows[leaf]) for e in range(count) for leaf in ordered]
    return Stack(memory, (count, height, width), tuple(parts), rows)


def _order(memory: str, kinds: Iterable[str], built: Architecture | None) -> list[str]:
    """The last names of what is laid end to end, in the order of the table's entry."""
    transform = _transform_of(memory, built)
    return list(kinds) if transform is None else leaves(transform)


def _halves(memory: str, shape: Shape, built: Architecture | None) -> dict[str, tuple[int, int]]:
    """The rows that each part has, by the names they would have one by one; all parts are of one height."""
    transform = _transform_of(memory, built)
    names = [] if transform is None else leaves(transform)
    if not names or shape[1] % len(names):
        return {}
    height = shape[1] // len(names)
    return {leaf: (at * height, (at + 1) * height) for at, leaf in enumerate(names)}


def _transform_of(memory: str, built: Architecture | None) -> Transform | None:
    """The table's entry that makes this stack of modules."""
    return next(
        (
            t
            for t in (() if built is None else built.transforms)
            if t.kind == "convert" and STACKING in t.operations and memory.endswith(t.targets[0])
        ),
        None,
    )


def leaves(transform: Transform) -> list[str]:
    """The last names of the modules that an entry stacks, in order: `gate_proj`, `up_proj`."""
    found = re.findall(r"\.([A-Za-z_]\w*)\\?\.weight", transform.pattern.pattern)
    return list(dict.fromkeys(found))


def parameter_order() -> tuple[str, ...]:
    """Parameters of modules that have several, in the order in which the classes declare them."""
    order: tuple[str, ...] = tuple(memory_names.table()["bare"]["order"])
    return order


def is_transposed(config: Mapping[str, Any]) -> bool:
    """True for classes that keep an expert's matrix `[in, out]` and say so, which PEFT asks them."""
    types = set(memory_names.table()["bare"]["transposed"])
    inner = [v for v in config.values() if isinstance(v, Mapping)]
    return any(part.get("model_type") in types for part in (config, *inner))


def expert_count(config: Mapping[str, Any]) -> int | None:
    """How many experts a config says a layer has; None where it says nothing, or several numbers."""
    keys: Mapping[str, list[str]] = memory_names.table()["bare"]["counts"]
    inner = [v for v in config.values() if isinstance(v, Mapping)]
    found = {
        part[key]
        for part in (config, *inner)
        for key, others in keys.items()
        if part.get("model_type") not in others
        and isinstance(part.get(key), int)
        and not isinstance(part.get(key), bool)
        and part[key] > 0
    }
    return next(iter(found)) if len(found) == 1 else None
