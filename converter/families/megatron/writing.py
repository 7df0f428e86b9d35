"""A model of transformers under megatron-core's names, by the same table that reads them: each layer, then stacked."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from converter.core.tensors.nodes import LazyTensor, concat, reshape
from converter.families.megatron.formulas import SizeError, Sizes, joined
from converter.families.megatron.rows import Row

_THEIR_LAYER = re.compile(r"model\.layers\.(\d+)\.", re.ASCII)
_OUR_LAYER = re.compile(r"decoder\.layers\.(\d+)\.", re.ASCII)
_EXPERT = re.compile(r"\.experts\.(\d+)\.", re.ASCII)
_EXPERTS = ".mlp.experts.experts."
_ROUTER = "decoder.layers.{N}.mlp.router.weight"


@dataclass
class Filed:
    """Tensors under Megatron's names.

    Attributes:
        tensors: by key, layers apart.
        unknown: names that no row takes.
        lacking: names that a row needs beside others that are there.
        misfits: names whose rows are not those that config.json implies, with the reason.
    """

    tensors: dict[str, LazyTensor] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    lacking: list[str] = field(default_factory=list)
    misfits: dict[str, str] = field(default_factory=dict)


def filed(held: Mapping[str, LazyTensor], rows: Collection[Row], sizes: Sizes, *, vocabulary: int) -> Filed:
    """Every tensor where the table has it.

    Args:
        vocabulary: rows of the embeddings, with those that no token has.
    """
    layers: dict[str, dict[str, LazyTensor]] = {}
    for name, tensor in held.items():
        match = _THEIR_LAYER.match(name)
        number = "" if match is None else match[1]
        layers.setdefault(number, {})[_THEIR_LAYER.sub("model.layers.{N}.", name, count=1)] = tensor
    found = Filed()
    for number in sorted(layers, key=lambda n: (bool(n), int(n or 0))):
        _file_layer(number, layers[number], rows, sizes, vocabulary, found)
    return found


def _file_layer(
    number: str, held: dict[str, LazyTensor], rows: Collection[Row], sizes: Sizes, vocabulary: int, found: Filed
) -> None:
    """One layer, or what is outside of them."""
    has_experts = any(r.ours == _ROUTER and r.theirs[0] in held for r in rows)
    numbers = {int(m[1]) for n in held if (m := _EXPERT.search(n)) is not None}
    used: set[str] = set()
    for row in rows:
        if row.layers != "all" and (row.layers == "experts") != has_experts:
            continue
        names = [n.replace("{E}", str(e)) for e in range(len(numbers)) for n in row.theirs]
        names = names if "{E}" in row.theirs[0] else list(row.theirs)
        here = [n for n in names if n in held]
        if not here:
            continue
        used.update(here)
        if len(here) < len(names):
            found.lacking += [n.replace("{N}", number) for n in names if n not in held]
            continue
        try:
            made = joined(row, {n: held[n] for n in names}, sizes, rows=vocabulary)
        except SizeError as error:
            found.misfits[here[0].replace("{N}", number)] = str(error)
            continue
        found.tensors[row.ours.replace("{N}", number)] = made
    found.unknown += [n.replace("{N}", number) for n in held if n not in used]


def is_homogeneous(held: Mapping[str, LazyTensor]) -> bool:
    """True where every layer has the same tensors, so that Megatron stacks them."""
    layers: dict[str, set[tuple[str, object]]] = {}
    for key, tensor in held.items():
        if (match := _OUR_LAYER.match(key)) is not None:
            layers.setdefault(match[1], set()).add((key[match.end() :], tensor.info))
    kinds = list(layers.values())
    return bool(kinds) and all(k == kinds[0] for k in kinds)


def stacked(held: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Tensors of layers as one of each kind, `[L, ...]`, in place of the first; the others as they are."""
    groups: dict[str, dict[int, LazyTensor]] = {}
    found: dict[str, LazyTensor] = {}
    for key, tensor in held.items():
        match = _OUR_LAYER.match(key)
        if match is None:
            found[key] = tensor
        else:
            groups.setdefault(f"decoder.layers.{key[match.end() :]}", {})[int(match[1])] = tensor
    for key, layers in groups.items():
        each = [reshape(layers[n], (1, *layers[n].info.shape)) for n in sorted(layers)]
        found[key] = concat(each, 0)
    return found


def pieces(key: str, *, is_stacked: bool) -> int:
    """Leading dimensions of a tensor that are saved index by index: of layers, and of experts."""
    of_layers = 1 if is_stacked and key.startswith("decoder.layers.") else 0
    return of_layers + (1 if _EXPERTS in f".{key}" else 0)
