"""A whole set of megatron-core's tensors under transformers' names, and what can't be placed."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from converter.core.tensors.nodes import LazyTensor
from converter.families.megatron.formulas import SizeError, Sizes, parts
from converter.families.megatron.rows import Row

LAYER = re.compile(r"decoder\.layers\.(\d+)\.", re.ASCII)
"""What the key of a layer that lies apart begins with."""
_OF_MEGATRON = re.compile(
    r"embedding\.word_embeddings\.weight|decoder\.final_layernorm\.weight|"
    r"decoder\.layers\.(?:\d+\.)?(?:self_attention\.linear_|mlp\.(?:linear_fc|experts\.experts\.)).+",
    re.ASCII,
)
ARGUMENTS_FILE = "megatron-args.json"
"""What `gather` gets the arguments of a training script in, where they are recorded; it is written into no output."""

Value = str | int | float | bool | None
"""Of an argument."""


def is_megatron(names: Iterable[str]) -> bool:
    """True for names that megatron-core gives to a GPT model's tensors."""
    return any(_OF_MEGATRON.fullmatch(n) for n in names)


def is_stacked(names: Iterable[str]) -> bool:
    """True where the layers of a model are one tensor each kind, as they lie in a file."""
    return any(n.startswith("decoder.layers.") and LAYER.match(n) is None for n in names)


def layer_count(names: Iterable[str]) -> int:
    """How many layers there are, by the highest number."""
    return max((int(m[1]) + 1 for n in names if (m := LAYER.match(n)) is not None), default=0)


@dataclass
class Placed:
    """Tensors under transformers' names.

    Attributes:
        tensors: by name.
        unknown: keys that no row takes.
        misfits: keys whose rows are not those that config.json implies, with the reason.
        twice: names that two keys would become.
    """

    tensors: dict[str, LazyTensor] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    misfits: dict[str, str] = field(default_factory=dict)
    twice: list[str] = field(default_factory=list)


def placed(held: Mapping[str, LazyTensor], rows: Collection[Row], sizes: Sizes) -> Placed:
    """Every tensor where the table has it, in the order of the files."""
    by_key = {key: row for row in rows for key in (row.ours, *row.others)}
    found = Placed()
    for name, tensor in held.items():
        match = LAYER.match(name)
        number = "" if match is None else match[1]
        row = by_key.get(name if match is None else LAYER.sub("decoder.layers.{N}.", name, count=1))
        if row is None:
            found.unknown.append(name)
            continue
        try:
            made = parts(row, tensor, sizes)
        except SizeError as error:
            found.misfits[name] = str(error)
            continue
        for each, part in made.items():
            theirs = each.replace("{N}", number)
            if theirs in found.tensors:
                found.twice.append(theirs)
            found.tensors[theirs] = part
    return found
