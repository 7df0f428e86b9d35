"""Which bytes a lazy tensor is made of: what can be copied as it is, and what evaluating it reads."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import assert_never

from converter.core.tensors.dtypes import TensorInfo
from converter.core.tensors.nodes import Apply, Cast, Concat, Filled, LazyTensor, Narrow, Reshape, Stored, Strided
from converter.text import show

MIN_COPY_RUN = 64 * 1024
"""A tensor that is cut into many pieces is copied by the operating system only where they average this many bytes."""


@dataclass(frozen=True, slots=True)
class ByteRun:
    """`length` bytes of `file` from `offset`; of no file: zeros."""

    file: str
    offset: int
    length: int


Span = tuple[str, int, int]
"""A file, and the offsets of its first byte and of what follows its last."""


def byte_runs(x: LazyTensor, *, zeros: bool = False) -> tuple[ByteRun, ...] | None:
    """The bytes of the tensor, in order, where they lie in files as they are; None where they must be computed.

    Args:
        zeros: zeros need not lie anywhere; a new file has them where nothing is written.
    """
    if x.info.numel == 0:
        return ()
    match x:
        case Stored():
            return (ByteRun(x.file, x.offset, x.info.nbytes),)
        case Reshape():
            return byte_runs(x.source, zeros=zeros)
        case Narrow():
            return _cut_runs(x)
        case Filled() if zeros and x.value == 0 and math.copysign(1, x.value) > 0:
            return (ByteRun("", 0, x.info.nbytes),)
        case Concat():
            if math.prod(x.info.shape[: x.dim]) != 1:
                return None
            runs: list[ByteRun] = []
            for part in x.parts:
                own = byte_runs(part, zeros=zeros)
                if own is None:
                    return None
                runs += own
            return tuple(runs)
        case Strided() | Cast() | Filled() | Apply():
            return None
        case _:
            assert_never(x)


def _cut_runs(x: Narrow) -> tuple[ByteRun, ...] | None:
    """A slice of an inner dimension of stored bytes: one run for each index of the outer ones, if they are long."""
    if not isinstance(x.source, Stored):
        return None
    shape = x.source.info.shape
    bits = math.prod(shape[x.dim + 1 :]) * x.info.dtype.bits
    if bits % 8 or x.length * bits // 8 < MIN_COPY_RUN:
        return None
    inner = bits // 8
    step = shape[x.dim] * inner
    first = x.source.offset + x.start * inner
    return tuple(ByteRun(x.source.file, first + i * step, x.length * inner) for i in range(math.prod(shape[: x.dim])))


def leaves(x: LazyTensor) -> Iterator[Stored | Strided]:
    """Every stored node under `x`, in order; one that is used twice comes twice."""
    waiting = [x]
    while waiting:
        match node := waiting.pop():
            case Stored() | Strided():
                yield node
            case Narrow() | Reshape() | Cast():
                waiting.append(node.source)
            case Concat():
                waiting += reversed(node.parts)
            case Apply():
                waiting += reversed(node.inputs)
            case Filled():
                pass
            case _:
                assert_never(node)


def stored_parts(x: LazyTensor) -> Iterator[LazyTensor]:
    """Nodes under `x` whose bytes lie in files as they are, the largest of them: at least what `x` is computed of."""
    waiting = [x]
    while waiting:
        node = waiting.pop()
        if byte_runs(node) is not None:
            yield node
            continue
        match node:
            case Narrow() | Reshape() | Cast():
                waiting.append(node.source)
            case Concat():
                waiting += reversed(node.parts)
            case Apply():
                waiting += reversed(node.inputs)
            case Strided():
                last = sum((n - 1) * s for n, s in zip(node.info.shape, node.strides, strict=True))
                yield Stored(TensorInfo(node.info.dtype, (last + 1,)), node.file, node.offset)
            case Stored() | Filled():
                pass
            case _:
                assert_never(node)


def reads(x: LazyTensor) -> tuple[ByteRun, ...]:
    """Every byte range that evaluating `x` reads; a strided view reads from its first to its last element."""
    return tuple(ByteRun(file, start, stop - start) for file, start, stop in spans(x))


def spans(x: LazyTensor) -> list[Span]:
    """The same byte ranges, for those who only count or sort them: a plan has millions."""
    found: list[Span] = []
    for leaf in leaves(x):
        start, shape = leaf.offset, leaf.info.shape
        bits = leaf.info.dtype.bits
        if isinstance(leaf, Stored):
            length = (math.prod(shape) * bits + 7) // 8
        elif 0 in shape:
            length = 0
        else:
            length = (sum((n - 1) * s for n, s in zip(shape, leaf.strides, strict=True)) + 1) * bits // 8
        if length:
            found.append((leaf.file, start, start + length))
    return found


def describe(x: LazyTensor) -> str:
    """A node as one line for errors and `-v`: `lora-merge(W, A, B)`, `cast(BF16)`."""
    match x:
        case Apply():
            return f"{x.kernel}({len(x.inputs)} inputs)"
        case Cast():
            return f"cast to {x.dtype.value} of {describe(x.source)}"
        case _:
            return f"{type(x).__name__.lower()} {x.info.dtype.value} {show(list(x.info.shape))}"
