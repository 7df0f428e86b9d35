"""A base whose layers are repeated, as `layer_replication` of an adapter's config says: a deeper model.

PEFT builds it of the base in memory, with the same weights in every copy of a layer, and adapts each copy by itself.
Its merge adds all updates to the one weight that they share; here every copy gets its own.

Source: `replicate_layers`, https://github.com/huggingface/peft/blob/v0.21.2/src/peft/tuners/tuners_utils.py
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from converter.converters.merge.methods.method import AdapterConfig
from converter.core.checkpoint import Checkpoint
from converter.core.context import Context
from converter.core.tensors.nodes import LazyTensor
from converter.errors import Refused
from converter.text import show

_LAYER = re.compile(
    r"^(?P<list>(?:model\.|base_model\.)*layers|(?:bert\.)?encoder\.layer|(?:transformer\.)?h)\.(?P<n>\d+)\.", re.ASCII
)
_COUNTS = ("num_hidden_layers", "n_layer")
_MOST = 10_000

Ranges = tuple[tuple[int, int], ...]


def replicated(base: Checkpoint, configs: Sequence[AdapterConfig], context: Context) -> Checkpoint:
    """The deeper base that the adapters were trained over; the base itself where none repeats layers.

    Raises:
        Refused: the adapters repeat layers in different ways (`adapter-field-unsupported`), or the base does not have
            these layers in one list (`adapter-replication`).
    """
    asked: list[Ranges] = [tuple(c.fields.get("layer_replication") or ()) for c in configs]
    if not any(asked):
        return base
    where = show(base.origin.asked)
    if len(set(asked)) > 1:
        what = (
            "the adapters repeat the base's layers in different ways (`layer_replication`): they are over other models"
        )
        raise Refused("adapter-field-unsupported", what, where=where, facts={"field": "layer_replication"})
    layers = _layers(base)
    count, last = len(layers), max(stop for _, stop in asked[0])
    if last > count or sum(stop - start for start, stop in asked[0]) > _MOST:
        what = f"`layer_replication` asks for {last} layers, and the base has {count} in one list"
        raise Refused("adapter-replication", what, where=where, got=show(asked[0]))
    order = [layer for start, stop in asked[0] for layer in range(start, stop)]
    text = f"{count} layers become {len(order)}, as layer_replication says; the output is a deeper model"
    context.note("info", "layers-repeated", text)
    return _deeper(base, layers, order)


def _layers(base: Checkpoint) -> dict[int, dict[str, str]]:
    """Names of the tensors of each layer, by what stands behind its number; nothing where there are several lists."""
    found: dict[int, dict[str, str]] = {}
    lists = set()
    for name in base.tensors:
        match = _LAYER.match(name)
        if match is not None:
            lists.add(match["list"])
            found.setdefault(int(match["n"]), {})[name[match.end() :]] = name
    return dict(sorted(found.items())) if len(lists) == 1 and sorted(found) == list(range(len(found))) else {}


def _deeper(base: Checkpoint, layers: Mapping[int, Mapping[str, str]], order: Sequence[int]) -> Checkpoint:
    first = next(iter(layers[0].values()))
    match = _LAYER.match(first)
    assert match is not None
    stem = match["list"]
    inside = {name for held in layers.values() for name in held.values()}
    tensors: dict[str, LazyTensor] = {}
    shards: dict[str, str] = {}
    done = False
    for name, tensor in base.tensors.items():
        if name not in inside:
            tensors[name] = tensor
            if name in base.shards:
                shards[name] = base.shards[name]
        elif not done:
            done = True
            for new, old in enumerate(order):
                for rest, source in layers[old].items():
                    tensors[f"{stem}.{new}.{rest}"] = base.tensors[source]
                    if source in base.shards:
                        shards[f"{stem}.{new}.{rest}"] = base.shards[source]
    lost = {name: "of a layer that layer_replication leaves out" for n in layers if n not in order
            for name in layers[n].values()}  # fmt: skip
    config = _with_count(base.config, len(layers), order)
    ties = tuple(group for group in base.ties if not any(_LAYER.match(n) for n in group))
    dropped = {n: why for n, why in lost.items() if n not in tensors}
    left = (*base.left, *(base.tensors[n] for n in lost if n in tensors))
    return base.replace(
        tensors=tensors, shards=shards, config=config, ties=ties, dropped={**base.dropped, **dropped}, left=left
    )


def _with_count(config: Mapping[str, Any], count: int, order: Sequence[int]) -> dict[str, Any]:
    """The config of the deeper model: the number of layers, and lists that have an entry for each."""
    made: dict[str, Any] = {}
    for key, value in config.items():
        if key in _COUNTS and value == count:
            made[key] = len(order)
        elif isinstance(value, list) and len(value) == count and "layer" in key:
            made[key] = [value[old] for old in order]
        else:
            made[key] = value
    return made
