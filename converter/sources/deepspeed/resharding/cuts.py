"""How ZeRO cuts parameters for a number of ranks: in stage 3 each by itself, in stages 1 and 2 all end to end.

Source: https://github.com/deepspeedai/DeepSpeed/blob/v0.19.8/deepspeed/runtime/zero/stage_1_and_2.py
(`_round_robin_reorder`, `flatten_dense_tensors_aligned`, `link_hp_params`) and stage3.py (`_create_fp16_sub_groups`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from converter.core.tensors import nodes as tensors
from converter.core.tensors.dtypes import TensorInfo
from converter.core.tensors.nodes import Filled, LazyTensor
from converter.sources.deepspeed.experts import is_data_first
from converter.sources.deepspeed.layout import share
from converter.sources.deepspeed.zero_folder import Shapes

ALIGNMENT = 2
"""A group is padded to a multiple of this for each rank. Source: `nccl_start_alignment_factor`."""
DEFAULT_SUB_GROUP_SIZE = 10**9
ALIGNED_BYTES = 16


@dataclass(frozen=True)
class Rules:
    """Settings of a run that the layout of its files depends on.

    Attributes:
        sub_group_size: elements of one rank after which a sub-group of stage 3 ends.
        round_robin: parameters of stages 1 and 2 are dealt to the ranks in turn.
        aligned_elements: parameters of stages 1 and 2 begin at multiples of this.
        is_data_first: ranks with the same experts lie side by side.
    """

    sub_group_size: int = DEFAULT_SUB_GROUP_SIZE
    round_robin: bool = False
    aligned_elements: int = 1
    is_data_first: bool = False

    @classmethod
    def of(cls, config: Any, element_bytes: int) -> Rules:
        """The rules that DeepSpeed's settings give for parameters of that many bytes an element."""
        zero = config.get("zero_optimization") if isinstance(config, dict) else None
        zero = zero if isinstance(zero, dict) else {}
        size = zero.get("sub_group_size", DEFAULT_SUB_GROUP_SIZE)
        aligned = (
            ALIGNED_BYTES // math.gcd(ALIGNED_BYTES, element_bytes) if zero.get("parameter_alignment") is True else 1
        )
        return cls(
            int(size) if isinstance(size, int | float) and not isinstance(size, bool) else DEFAULT_SUB_GROUP_SIZE,
            zero.get("round_robin_gradients") is True,
            aligned,
            is_data_first(config),
        )

    def flat_order(self, names: Sequence[str], ranks: int) -> list[str]:
        """The order in which a group of stages 1 and 2 is laid end to end."""
        if not self.round_robin:
            return list(names)
        return [n for first in range(min(ranks, len(names))) for n in names[first::ranks]]

    def original_order(self, flat: Shapes, ranks: int) -> Shapes:
        """The optimizer's order of a group that lies in `flat`'s."""
        places = self.flat_order([str(i) for i in range(len(flat))], ranks)
        names = dict(zip(map(int, places), flat, strict=True))
        return {names[i]: flat[names[i]] for i in range(len(flat))}


def sub_groups(shapes: Shapes, ranks: int, limit: int) -> list[Shapes]:
    """The sub-groups of a parameter group of stage 3: closed when one rank's elements reach the limit."""
    counts = {n: share(math.prod(s), ranks) for n, s in shapes.items()}
    if not shapes or limit >= sum(counts.values()):
        return [shapes] if shapes else []
    found: list[Shapes] = [{}]
    held = 0
    for name, shape in shapes.items():
        if found[-1] and held >= limit:
            found.append({})
            held = 0
        found[-1][name] = shape
        held += counts[name]
    return found


def piece(flat: LazyTensor, ranks: int, rank: int) -> LazyTensor:
    """A rank's share of a parameter in stage 3, padded with zeros to the length that all have."""
    count = flat.info.numel
    part = share(count, ranks)
    start = min(rank * part, count)
    length = min(part, count - start)
    return _padded([tensors.narrow(flat, 0, start, length)], part - length, flat.info)


@dataclass(frozen=True)
class FlatLayout:
    """A group of stages 1 and 2, laid end to end and cut.

    Attributes:
        names: its parameters in flat order.
        starts, counts, gaps: of each: its first element, its elements, and the padding after it.
        total: elements up to the end of the last parameter.
        part: elements of each rank.
    """

    names: tuple[str, ...]
    starts: tuple[int, ...]
    counts: tuple[int, ...]
    gaps: tuple[int, ...]
    total: int
    part: int

    def padding(self, rank: int) -> int:
        """Elements at the end of a rank's part that belong to no parameter of the group."""
        return min(max((rank + 1) * self.part - self.total, 0), self.part)

    def stretch(self, flats: Mapping[str, LazyTensor], like: TensorInfo, rank: int, *, is_lean: bool) -> LazyTensor:
        """A rank's part; lean: without the padding at its end."""
        begin, end = rank * self.part, (rank + 1) * self.part - self.padding(rank)
        pieces: list[LazyTensor] = []
        for name, start, count, gap in zip(self.names, self.starts, self.counts, self.gaps, strict=True):
            low, high = max(begin, start), min(end, start + count)
            if low < high:
                pieces.append(tensors.narrow(flats[name], 0, low - start, high - low))
            low, high = max(begin, start + count), min(end, start + count + gap)
            if low < high:
                pieces.append(Filled(TensorInfo(like.dtype, (high - low,)), 0))
        return _padded(pieces, 0 if is_lean else self.padding(rank), like)

    def fragments(self, order: Sequence[str], rank: int) -> dict[str, tuple[int, int]]:
        """Start in the rank's part, and elements, of each parameter that has any there, as DeepSpeed lists them.

        It counts in the optimizer's order, which under round robin is not where the parameters are, unless they are
        padded.
        """
        count = dict(zip(self.names, self.counts, strict=True))
        if any(self.gaps):
            start = dict(zip(self.names, self.starts, strict=True))
        else:
            ends = [sum(count[n] for n in order[: i + 1]) for i in range(len(order))]
            start = {n: end - count[n] for n, end in zip(order, ends, strict=True)}
        found = {}
        for name in order:
            low = max(start[name], rank * self.part)
            high = min(start[name] + count[name], (rank + 1) * self.part)
            if low < high:
                found[name] = (low - rank * self.part, high - low)
        return found


def flat_layout(shapes: Shapes, ranks: int, rules: Rules) -> FlatLayout:
    """The layout of a group, given in the optimizer's order, for a number of ranks."""
    names = rules.flat_order(list(shapes), ranks)
    starts, counts, gaps = [], [], []
    at = 0
    for index, name in enumerate(names):
        count = math.prod(shapes[name])
        starts.append(at)
        counts.append(count)
        at += count
        gaps.append(-at % rules.aligned_elements if index < len(names) - 1 else 0)
        at += gaps[-1]
    unit = ALIGNMENT * ranks
    return FlatLayout(tuple(names), tuple(starts), tuple(counts), tuple(gaps), at, math.ceil(at / unit) * unit // ranks)


def _padded(pieces: Sequence[LazyTensor], padding: int, like: TensorInfo) -> LazyTensor:
    end = [Filled(TensorInfo(like.dtype, (padding,)), 0)] if padding else []
    if not pieces and not end:
        return Filled(TensorInfo(like.dtype, (0,)), 0)
    return tensors.concat([*pieces, *end], 0)
