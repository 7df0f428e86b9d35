"""A base whose weights a load cuts, joins or permutes, with the modules that an adapter is over.

Jina's and Nomic's encoders hold query, key and value in one tensor, and transformers has three modules of it; an
adapter of any method is over these. Here the base gets them while adapters are merged, as views of its own tensors, and
its own form again afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from converter.converters.merge.adapter_keys import read_modules
from converter.converters.merge.foreign_adapters import plain_names
from converter.core.checkpoint import Checkpoint
from converter.core.tensors.nodes import LazyTensor
from converter.families.memory_names import Architecture, architectures
from converter.families.rearranged import Views, find_rearranged, views_of
from converter.text import show

_LEAVES = (".weight", ".bias")


@dataclass(frozen=True)
class AsLoaded:
    """A base with the tensors of some modules as a load makes them.

    Attributes:
        before: the base in its own form.
    """

    base: Checkpoint
    before: Checkpoint
    views: tuple[Views, ...] = ()

    def restored(self, merged: Checkpoint) -> Checkpoint:
        """The result in the base's own form."""
        if not self.views:
            return merged
        starts = {v.group.targets[0]: v for v in self.views}
        inside = {name for v in self.views for name in v.group.targets}
        tensors: dict[str, LazyTensor] = {}
        for name, tensor in merged.tensors.items():
            if name in starts:
                tensors |= starts[name].back(merged.tensors, self.before.tensors)
            elif name not in inside:
                tensors[name] = tensor
        shards = {n: f for n, f in merged.shards.items() if n not in inside}
        shards |= {n: f for n, f in self.before.shards.items() if n in tensors}
        lost = [n for n in merged.dropped if n in inside]
        return merged.replace(
            tensors=tensors,
            shards=shards,
            dropped={n: why for n, why in merged.dropped.items() if n not in inside},
            left=(*merged.left, *(self.base.tensors[n] for n in lost)),
        )


def as_loaded(base: Checkpoint, adapters: Sequence[Checkpoint]) -> AsLoaded:
    """The base with modules that adapters have and that it holds in another form; as it is where it has all."""
    asked: set[str] = set()
    for adapter in adapters:
        where = show(adapter.origin.asked)
        held, _ = plain_names(adapter.tensors, where)
        asked |= {n for n in read_modules(held, where).modules if f"{n}.weight" not in base.tensors}
    views: tuple[Views, ...] = ()
    for built in dict.fromkeys(a for adapter in adapters for a in architectures(base.config, adapter.config)):
        views = _views(base, built, asked) if asked else ()
        if views:
            break
    if not views:
        return AsLoaded(base, base)
    tensors: dict[str, LazyTensor] = {}
    shards = dict(base.shards)
    starts = {v.group.sources[0]: v for v in views}
    inside = {name: v for v in views for name in v.group.sources}
    for name, tensor in base.tensors.items():
        if name in starts:
            tensors |= starts[name].made
        elif name not in inside:
            tensors[name] = tensor
        if name in inside and shards.pop(name, None) is not None and name in starts:
            shards |= dict.fromkeys(starts[name].made, base.shards[name])
    return AsLoaded(base.replace(tensors=tensors, shards=shards), base, views)


def _views(base: Checkpoint, built: Architecture, asked: set[str]) -> tuple[Views, ...]:
    """What a load of this class makes for the modules that are asked for."""
    prefix = f"{built.prefix}."
    spelled = asked | {n.removeprefix(prefix) for n in asked} | {prefix + n for n in asked}
    tied = {name for group in base.ties for name in group}
    found = []
    for group in find_rearranged(built, base.tensors):
        if any(_module(t) in spelled for t in group.targets) and tied.isdisjoint((*group.sources, *group.targets)):
            made = views_of(group, base.tensors, base.config)
            found += [made] if made is not None else []
    return tuple(found)


def _module(name: str) -> str:
    return next((name.removesuffix(leaf) for leaf in _LEAVES if name.endswith(leaf)), name)
