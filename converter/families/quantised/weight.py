"""A quantised weight and its format: the tensors that are its parts, its name and shape once it is whole.

A format is a file with a value of type `Format`. It goes by tensors, never by a config's list of modules: what is
quantised is what has a scale. The config says block sizes and bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from converter.core.context import Context
from converter.core.tensors.dtypes import DType, TensorInfo
from converter.core.tensors.nodes import LazyTensor
from converter.text import show

Shape = tuple[int, ...]
Infos = Mapping[str, TensorInfo]


@dataclass(frozen=True)
class Weight:
    """A quantised weight.

    Attributes:
        name: what the tensor is called once it is whole.
        scheme: in words, as `NF4` or `FP8 in blocks of 128 x 128`.
        parts: its tensors by what each is; the first takes the weight's place in its file.
        shape: once it is whole; None where a tensor records it.
        elements: the least and the most that its parts can hold.
        rows: how many rows it has, where `shape` is None and this is known.
        params: of the format, for making it whole.
    """

    name: str
    scheme: str
    parts: Mapping[str, str]
    shape: Shape | None
    elements: tuple[int, int] = (0, 0)
    rows: int | None = None
    params: Mapping[str, Any] = field(default_factory=dict)

    def fits(self, shape: Shape) -> bool:
        """True where the parts can be a weight of that shape."""
        if self.shape is not None:
            return self.shape == shape
        low, high = self.elements
        return low <= math.prod(shape) <= high and (self.rows is None or shape[:1] == (self.rows,))

    @property
    def main(self) -> str:
        """The tensor whose place it takes."""
        return next(iter(self.parts.values()))


@dataclass(frozen=True)
class Fault:
    """Parts that are not a weight: one is missing, or their shapes do not go together."""

    tensor: str
    text: str


Found = Weight | Fault


@dataclass(frozen=True)
class Format:
    """A format of quantised weights.

    Attributes:
        find: its weights, and what looks like one and is not whole. Arguments: infos by name, `quantization_config`.
        whole: the weight as one lazy tensor of the given dtype. Arguments: the weight, its parts' tensors by what each
            is, the dtype, a context for values that say how to read it.
        words: what of the method it is, for the table of bases.
        compared: with what its values are compared, bit by bit.
    """

    find: Callable[[Infos, Mapping[str, Any]], Iterable[Found]]
    whole: Callable[[Weight, Mapping[str, LazyTensor], DType, Context], LazyTensor]
    words: str = ""
    compared: str = ""


def missing(tensor: str, part: str) -> Fault:
    """The fault of a weight without one of its parts."""
    return Fault(tensor, f"{show(tensor)} is quantised, and {show(part)} is not there")


def misshapen(tensor: str, part: str, got: Shape, asked: Shape | str) -> Fault:
    """The fault of parts whose shapes do not go together."""
    expected = asked if isinstance(asked, str) else str(list(asked))
    return Fault(part, f"{show(part)} of {show(tensor)} is {list(got)}, and {expected} is expected")


def mistyped(tensor: str, part: str, got: DType, asked: str) -> Fault:
    """The fault of a part of a type that holds something else."""
    return Fault(part, f"{show(part)} of {show(tensor)} is {got.value}, and {asked} is expected")


def orphan(tensor: str, of: str) -> Fault:
    """The fault of a scale whose weight is not there, or is not quantised."""
    return Fault(tensor, f"{show(tensor)} is a part of a quantised weight, and {show(of)} is not one")
