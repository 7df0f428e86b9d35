"""Gated delta nets, the linear attention of Qwen3-Next: what transformers has of Megatron's tensors.

A checkpoint has `in_proj` and `conv1d` of a layer in parts, each whole over all ranks; heads lie one after the other in
each. transformers has the parts of one head of keys together. In layers of usual attention queries have gates: Megatron
has those of a group behind its queries, transformers each behind its own.

Source: `GatedDeltaNet` of https://github.com/NVIDIA/Megatron-LM/blob/core_v0.16.1/megatron/core/ssm/gated_delta_net.py
and `SelfAttention` of transformer/attention.py there; `fix_query_key_value_ordering` of
https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/models/qwen3_next/modeling_qwen3_next.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

from converter.core.tensors.kernel_specs import HEAD_ROWS
from converter.core.tensors.nodes import LazyTensor, apply, concat, narrow, reshape

_CHANNELS = ("query", "key", "value")
_PARTS = {"in_proj.weight": (*_CHANNELS, "z", "beta", "alpha"), "conv1d.weight": _CHANNELS}
_PART = re.compile(r"(?P<whole>.+\.self_attention\.(?P<leaf>in_proj\.weight|conv1d\.weight))\.[a-z]+", re.ASCII)
FIELDS = ("linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim")


@dataclass(frozen=True)
class DeltaSizes:
    """Numbers of a gated delta net: heads of keys, which queries have as many of, and of values; and their sizes."""

    key_heads: int
    value_heads: int
    key_head: int
    value_head: int

    @property
    def projections(self) -> tuple[int, ...]:
        """Rows of each part of `in_proj`."""
        keys, values = self.key_heads * self.key_head, self.value_heads * self.value_head
        return (keys, keys, values, values, self.value_heads, self.value_heads)

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> DeltaSizes | None:
        """The numbers that a config says; None where it has none, or none that make whole groups."""
        found = [config.get(field) for field in FIELDS]
        counts = [n for n in found if type(n) is int and n > 0]
        return None if len(counts) < len(FIELDS) or counts[1] % counts[0] else cls(*counts)


def with_parts_joined(held: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """The same with the parts of a layer's projection, and of its convolution, as one; nothing where one is missing."""
    found: dict[str, LazyTensor] = {}
    for key, tensor in held.items():
        match = _PART.fullmatch(key)
        names = [] if match is None else [f"{match['whole']}.{part}" for part in _PARTS[match["leaf"]]]
        if match is None or not all(n in held for n in names):
            found[key] = tensor
        elif key == names[0]:
            found[match["whole"]] = concat([held[n] for n in names], 0)
    return found


def projections(tensor: LazyTensor, sizes: DeltaSizes) -> tuple[LazyTensor, LazyTensor]:
    """`[query; key; value; z; beta; alpha]` as what each head of keys has: of the first four, and of the last two."""
    ends = [0, *accumulate(sizes.projections)]
    each = [
        [narrow(tensor, 0, start + head * step, step) for head in range(sizes.key_heads)]
        for start, stop in pairwise(ends)
        if (step := (stop - start) // sizes.key_heads)
    ]
    first, second = ([part[h] for h in range(sizes.key_heads) for part in parts] for parts in (each[:4], each[4:]))
    return concat(first, 0), concat(second, 0)


def gated_queries(tensor: LazyTensor, start: int, heads: int, head: int) -> list[LazyTensor]:
    """The heads of a group that begins at a row: each one's queries, then its gates."""
    rows = [(start + n * head, start + (heads + n) * head) for n in range(heads)]
    return [narrow(tensor, 0, at, head) for pair in rows for at in pair]


def one_more(tensor: LazyTensor) -> LazyTensor:
    """1 + w, rounded once to the element type of w."""
    row = reshape(tensor, (1, tensor.info.numel))
    one = (1.0,)
    made = apply(HEAD_ROWS, [row], {"coefficients": one, "shift": one, "divisor": one, "out": tensor.info.dtype.value})
    return reshape(made, tensor.info.shape)
