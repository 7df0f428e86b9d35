"""Weights that a load cuts, lays end to end or permutes: what it makes of them, and the way back.

Some checkpoints hold the projections of an attention in one tensor, `attn.Wqkv.weight` `[3 * width, width]`, which
transformers loads into three modules; others hold two tensors that it loads into one. An adapter is over the modules.
What is made here are views of the same bytes, and the way back is exact: no value is computed.

Experts that a load stacks are not here: see `stacks`.

Source: `Chunk`, `Split`, `Concatenate` and `PermuteForRope` of
https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/core_model_loading.py
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from converter.core.tensors import nodes as tensors
from converter.core.tensors.kernel_specs import PERMUTE
from converter.core.tensors.nodes import LazyTensor
from converter.errors import Refused
from converter.families import memory_names
from converter.families.memory_names import Architecture
from converter.families.transforms import Transform
from converter.text import fold

_JOINS = frozenset({"Concatenate"})
_KNOWN = _JOINS | {"Chunk", "Split", "Chunk+PermuteForRope", "PermuteForRope"}
_QUERY_KEY_VALUE = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True)
class Rearranged:
    """Tensors on disk, and those in memory that a load makes of them.

    Attributes:
        sources: names on disk, in the order in which they are laid end to end.
        targets: names in memory.
    """

    transform: Transform
    sources: tuple[str, ...]
    targets: tuple[str, ...]


def find_rearranged(built: Architecture, stored: Iterable[str]) -> list[Rearranged]:
    """Everything that a load of this class rearranges; nothing of it has a name that another tensor has."""
    names = set(stored)
    met: set[int] = set()
    found: dict[str, tuple[Transform, list[tuple[int, str]]]] = {}
    for name in memory_names.sorted_names(names):
        memory, transform = built.in_memory(name, met)
        if transform is None or transform.operations not in _KNOWN:
            continue
        place = transform.found(built.renamed(name))
        if place is not None:
            found.setdefault(memory, (transform, []))[1].append((place[1], name))
    groups = []
    for memory, (transform, sources) in found.items():
        first = transform.targets[0]
        targets = tuple(memory.replace(first, target) for target in transform.targets)
        ordered = tuple(name for _, name in sorted(sources, key=lambda s: s[0]))
        is_new = all(t not in names and built.in_memory(t) == (t, None) for t in targets)
        if is_new and (len(ordered) == 1 or transform.operations in _JOINS):
            groups.append(Rearranged(transform, ordered, targets))
    return groups


@dataclass(frozen=True)
class Views:
    """What a load makes of stored tensors, and what each is before it is permuted.

    Attributes:
        made: by name in memory.
        parts: the same in the order on disk: stretches of the stored tensors.
    """

    group: Rearranged
    made: Mapping[str, LazyTensor]
    parts: Mapping[str, LazyTensor]
    heads: int

    def back(self, found: Mapping[str, LazyTensor], stored: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
        """The tensors on disk whose load gives the tensors found, by name on disk; what did not change is as stored."""
        group = self.group
        if all(found[n] == self.made[n] for n in group.targets):
            return {name: stored[name] for name in group.sources}
        parts = [
            self.parts[n] if found[n] == self.made[n] else _turned(group, n, found[n], self.heads, back=True)
            for n in group.targets
        ]
        whole = tensors.concat(parts, 0) if len(parts) > 1 else parts[0]
        if whole.info.shape[0] != sum(stored[name].info.shape[0] for name in group.sources):
            what = f"{fold(group.targets)} has other rows than {fold(group.sources)}, of which a load makes it"
            raise Refused("adapter-shape", what)
        made: dict[str, LazyTensor] = {}
        at = 0
        for name in group.sources:
            length = stored[name].info.shape[0]
            made[name] = tensors.narrow(whole, 0, at, length) if len(group.sources) > 1 else whole
            at += length
        return made


def views_of(group: Rearranged, stored: Mapping[str, LazyTensor], config: Mapping[str, Any]) -> Views | None:
    """The tensors that a load makes; None where shapes or config leave open how, or it is not along the rows."""
    held = [stored[name] for name in group.sources]
    change = group.transform.change
    if change.dim or change.count or any(len(t.info.shape) not in (1, 2) for t in held):
        return None
    if len({(t.info.dtype, t.info.shape[1:]) for t in held}) != 1:
        return None
    whole = tensors.concat(held, 0) if len(held) > 1 else held[0]
    heads = _heads(group, config)
    sizes = _sizes(group, whole.info.shape[0], config)
    if sizes is None or (change.permute and not heads):
        return None
    parts: dict[str, LazyTensor] = {}
    at = 0
    for name, size in zip(group.targets, sizes, strict=True):
        parts[name] = tensors.narrow(whole, 0, at, size)
        at += size
    if change.permute and any(size % (2 * heads) for size in sizes):
        return None
    made = {name: _turned(group, name, part, heads) for name, part in parts.items()}
    return Views(group, made, parts, heads)


def _sizes(group: Rearranged, rows: int, config: Mapping[str, Any]) -> Sequence[int] | None:
    """The rows that each target has."""
    count = len(group.targets)
    if group.transform.operations != "Split":
        return [rows // count] * count if rows % count == 0 else None
    leaves = [name.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2] for name in group.targets]
    section = config.get("text_config", config)
    if tuple(leaves) != _QUERY_KEY_VALUE or not isinstance(section, Mapping):
        return None
    heads, pairs = section.get("num_attention_heads"), section.get("num_key_value_heads")
    if type(heads) is not int or type(pairs) is not int or heads < 1 or pairs < 1 or rows % (heads + 2 * pairs):
        return None
    width = rows // (heads + 2 * pairs)
    return [heads * width, pairs * width, pairs * width]


def _heads(group: Rearranged, config: Mapping[str, Any]) -> int:
    """The heads that a permutation goes by; 0 where the config does not say."""
    if not group.transform.change.permute:
        return 0
    part = group.transform.change.permute[0]
    section = config.get(part, config) if part else config
    heads = section.get("num_attention_heads") if isinstance(section, Mapping) else None
    return heads if type(heads) is int and heads > 0 else 0


def _turned(group: Rearranged, name: str, part: LazyTensor, heads: int, *, back: bool = False) -> LazyTensor:
    """One target as a load permutes it, or the way back."""
    permute = group.transform.change.permute
    if not permute or (len(permute) > 1 and not any(word in name for word in permute[1:])):
        return part
    rows, *rest = part.info.shape
    half = rows // heads // 2
    halves = (2, half) if back else (half, 2)
    shape = (heads, *halves, *rest)
    dims = (0, 2, 1, *range(3, len(shape)))
    turned = tensors.apply(PERMUTE, [tensors.reshape(part, shape)], {"dims": dims})
    return tensors.reshape(turned, part.info.shape)
