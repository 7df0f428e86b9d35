"""Lazy tensors: eight kinds of frozen node that say where bytes come from. Data, not closures; no torch.

A plan is made of these, so every question about it ("can this be byte-copied?", "what is read?", "is this the plan
that I began yesterday?") is a question about a value. Nodes are normalised when they are built; build them with the
lower-case functions below, never with the classes: otherwise plans grow and byte copies are missed.

Normal form: a Narrow sits as deep as it can (through Cast, Concat, Filled, Strided, row-separable Apply), lower
dimensions innermost; what is contiguous in a file is one Stored; nested Reshape, Concat of one dimension and lossless
Cast chains are folded.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import assert_never

from converter.core.tensors import kernel_specs
from converter.core.tensors.dtypes import DType, Shaped, TensorInfo, Typed, widens
from converter.core.tensors.kernel_specs import KernelSpec, Param
from converter.errors import Refused


@dataclass(frozen=True, slots=True)
class Stored(Typed, Shaped):
    """Contiguous bytes of one file, row-major, little-endian."""

    info: TensorInfo
    file: str
    offset: int


@dataclass(frozen=True, slots=True)
class Strided(Typed, Shaped):
    """A saved view that is not contiguous: element `i` lies `sum(i * strides)` elements past `offset` (bytes)."""

    info: TensorInfo
    file: str
    offset: int
    strides: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Narrow(Typed, Shaped):
    """`length` indices of dimension `dim` of `source`, from `start`."""

    source: LazyTensor
    dim: int
    start: int
    length: int
    info: TensorInfo = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        shape = self.source.info.shape
        whole = (*shape[: self.dim], self.length, *shape[self.dim + 1 :])
        object.__setattr__(self, "info", TensorInfo(self.source.info.dtype, whole))


@dataclass(frozen=True, slots=True)
class Reshape(Typed):
    """The same elements, row-major, in another shape."""

    source: LazyTensor
    shape: tuple[int, ...]
    info: TensorInfo = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "info", TensorInfo(self.source.info.dtype, self.shape))


@dataclass(frozen=True, slots=True)
class Concat(Typed, Shaped):
    """Parts laid end to end along `dim`."""

    parts: tuple[LazyTensor, ...]
    dim: int
    info: TensorInfo = field(init=False, compare=False, repr=False)
    ends: tuple[int, ...] = field(init=False, compare=False, repr=False)
    """Where each part ends along `dim`: a part is found among thousands without walking along them."""

    def __post_init__(self) -> None:
        ends = tuple(accumulate(p.info.shape[self.dim] for p in self.parts))
        object.__setattr__(self, "ends", ends)
        first = self.parts[0].info
        whole = (*first.shape[: self.dim], ends[-1], *first.shape[self.dim + 1 :])
        object.__setattr__(self, "info", TensorInfo(first.dtype, whole))


@dataclass(frozen=True, slots=True)
class Cast(Shaped):
    """The same values in another dtype, rounded to nearest even."""

    source: LazyTensor
    dtype: DType
    info: TensorInfo = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "info", TensorInfo(self.dtype, self.source.info.shape))


@dataclass(frozen=True, slots=True)
class Filled(Typed, Shaped):
    """One value everywhere; never random."""

    info: TensorInfo
    value: float | int | bool


@dataclass(frozen=True, slots=True)
class Apply(Typed, Shaped):
    """A named kernel on inputs; `params` are sorted pairs of JSON values. `info` is what its spec declares."""

    kernel: str
    inputs: tuple[LazyTensor, ...]
    params: tuple[tuple[str, Param], ...]
    info: TensorInfo


LazyTensor = Stored | Strided | Narrow | Reshape | Concat | Cast | Filled | Apply


def stored(info: TensorInfo, file: str, offset: int) -> Stored:
    """Contiguous bytes of `file`; `offset` counts from the file's first byte."""
    return Stored(info, file, offset)


def strided(info: TensorInfo, file: str, offset: int, strides: tuple[int, ...]) -> LazyTensor:
    """A saved view; a contiguous one is Stored. `strides` count elements; `offset` is in bytes."""
    if info.numel == 0 or _is_contiguous(info.shape, strides):
        return Stored(info, file, offset)
    return Strided(info, file, offset, strides)


def narrow(x: LazyTensor, dim: int, start: int, length: int) -> LazyTensor:
    """`length` indices of dimension `dim`, from `start`.

    Raises:
        Refused: outside the tensor's shape, or a packed sub-byte type cut inside a byte (`narrow-out-of-range`).
    """
    shape = x.info.shape
    if min(dim, start, length) < 0 or dim >= len(shape) or start + length > shape[dim]:
        raise Refused(
            "narrow-out-of-range",
            f"rows {start}..{start + length} of dimension {dim} are outside the shape {list(shape)}",
        )
    if length == shape[dim]:
        return x
    info = TensorInfo(x.info.dtype, (*shape[:dim], length, *shape[dim + 1 :]))
    if info.numel == 0:
        return Filled(info, 0)
    match x:
        case Stored():
            if math.prod(shape[:dim]) == 1:
                bits = math.prod(shape[dim + 1 :]) * x.info.dtype.bits
                if (start * bits) % 8 or (length * bits) % 8:
                    raise Refused("narrow-out-of-range", f"{x.info.dtype.value} data can't be cut inside a byte")
                return Stored(info, x.file, x.offset + start * bits // 8)
            return Narrow(x, dim, start, length)
        case Strided():
            skip = start * x.strides[dim] * x.info.dtype.bits // 8
            return strided(info, x.file, x.offset + skip, x.strides)
        case Narrow():
            if x.dim == dim:
                return narrow(x.source, dim, x.start + start, length)
            if dim < x.dim:
                return narrow(narrow(x.source, dim, start, length), x.dim, x.start, x.length)
            return Narrow(x, dim, start, length)
        case Reshape():
            if dim == 0 and x.source.info.shape[:1] == shape[:1]:
                return reshape(narrow(x.source, 0, start, length), info.shape)
            if dim == 0 and len(x.source.info.shape) == 1:
                # Rows of what was laid out flat are a stretch of it: chunks need not read all.
                inner = math.prod(shape[1:])
                return reshape(narrow(x.source, 0, start * inner, length * inner), info.shape)
            return Narrow(x, dim, start, length)
        case Concat():
            if x.dim != dim:
                return concat([narrow(p, dim, start, length) for p in x.parts], x.dim)
            return concat(list(_overlapping(x, start, length)), dim)
        case Cast():
            return cast(narrow(x.source, dim, start, length), x.dtype)
        case Filled():
            return Filled(info, x.value)
        case Apply():
            return _narrow_apply(x, dim, start, length)
        case _:
            assert_never(x)


def _overlapping(x: Concat, start: int, length: int) -> Iterator[LazyTensor]:
    """What lies in `length` indices of the dimension that parts are laid along."""
    at = bisect_right(x.ends, start)
    stop = start + length
    while at < len(x.parts):
        part = x.parts[at]
        position = x.ends[at] - part.info.shape[x.dim]
        if position >= stop:
            return
        low, high = max(start - position, 0), min(stop, x.ends[at]) - position
        yield narrow(part, x.dim, low, high - low)
        at += 1


def _narrow_apply(x: Apply, dim: int, start: int, length: int) -> LazyTensor:
    spec = kernel_specs.find(x.kernel)
    params = dict(x.params)
    if dim == 0:
        infos = tuple(i.info for i in x.inputs)
        needs = spec.needs(start, start + length, infos, params)
        if needs is not None and all(_can_narrow(i, n) for i, n in zip(x.inputs, needs, strict=True)):
            pieces = [
                i if n is None else narrow(i, n.dim, n.start, n.length) for i, n in zip(x.inputs, needs, strict=True)
            ]
            return apply(spec, pieces, spec.cut(start, start + length, infos, params) if spec.cut else params)
    return Narrow(x, dim, start, length)


def _can_narrow(x: LazyTensor, need: kernel_specs.Slice | None) -> bool:
    """False where a slice of `x` costs computing all of it: then the consumer is computed whole too, once."""
    return need is None or need.length == x.info.shape[need.dim] or is_separable(x)


def is_separable(x: LazyTensor) -> bool:
    """True where some rows of the tensor can be had without computing all of it."""
    match x:
        case Stored() | Strided() | Filled():
            return True
        case Narrow() | Reshape() | Cast():
            return is_separable(x.source)
        case Concat():
            return all(is_separable(p) for p in x.parts)
        case Apply():
            if not x.info.shape or x.info.shape[0] < 2:
                return True
            infos = tuple(i.info for i in x.inputs)
            needs = kernel_specs.find(x.kernel).needs(0, 1, infos, dict(x.params))
            return needs is not None and all(n is None or is_separable(i) for i, n in zip(x.inputs, needs, strict=True))
        case _:
            assert_never(x)


def reshape(x: LazyTensor, shape: tuple[int, ...]) -> LazyTensor:
    """The same elements, row-major, in another shape.

    Raises:
        Refused: the number of elements differs (`reshape-numel`).
    """
    if math.prod(shape) != x.info.numel or any(n < 0 for n in shape):
        raise Refused("reshape-numel", f"{list(x.info.shape)} can't be viewed as {list(shape)}")
    if shape == x.info.shape:
        return x
    info = TensorInfo(x.info.dtype, shape)
    match x:
        case Stored():
            return Stored(info, x.file, x.offset)
        case Reshape():
            return reshape(x.source, shape)
        case Cast():
            return cast(reshape(x.source, shape), x.dtype)
        case Filled():
            return Filled(info, x.value)
        case Concat() if x.dim > 0 and (1, *shape) == x.info.shape:
            # One of a stack of tensors that ranks have parts of: their parts, so that bytes are copied as they lie.
            return concat([reshape(p, p.info.shape[1:]) for p in x.parts], x.dim - 1)
        case Strided() | Narrow() | Concat() | Apply():
            return Reshape(x, shape)
        case _:
            assert_never(x)


def concat(parts: Sequence[LazyTensor], dim: int) -> LazyTensor:
    """Parts laid end to end along `dim`; neighbours that are contiguous in one file become one.

    Raises:
        Refused: no parts, or their dtypes or other dimensions differ (`concat-mismatch`).
    """
    if not parts:
        raise Refused("concat-mismatch", "nothing to concatenate")
    first = parts[0].info
    if not 0 <= dim < len(first.shape):
        raise Refused("concat-mismatch", f"{list(first.shape)} has no dimension {dim}")
    rest = (*first.shape[:dim], *first.shape[dim + 1 :])
    for part in parts:
        shape = part.info.shape
        if (
            part.info.dtype is not first.dtype
            or (*shape[:dim], *shape[dim + 1 :]) != rest
            or len(shape) != len(first.shape)
        ):
            raise Refused(
                "concat-mismatch",
                f"{part.info.dtype.value} {list(shape)} can't follow {first.dtype.value} {list(first.shape)}",
            )
    flat: list[LazyTensor] = []
    for part in parts:
        for piece in part.parts if isinstance(part, Concat) and part.dim == dim else (part,):
            if piece.info.shape[dim] == 0:
                continue
            joined = _joined(flat[-1], piece, dim) if flat else None
            if joined is None:
                flat.append(piece)
            else:
                flat[-1] = joined
    if not flat:
        return parts[0]
    return flat[0] if len(flat) == 1 else Concat(tuple(flat), dim)


def _joined(a: LazyTensor, b: LazyTensor, dim: int) -> LazyTensor | None:
    """`a` followed by `b` as one node of the same kind, where they are neighbours."""
    length = a.info.shape[dim] + b.info.shape[dim]
    shape = (*a.info.shape[:dim], length, *a.info.shape[dim + 1 :])
    match a, b:
        case Stored(), Stored():
            adjacent = (
                a.file == b.file
                and a.offset + a.info.nbytes == b.offset
                and (a.info.numel * a.info.dtype.bits) % 8 == 0
            )
            if adjacent and math.prod(shape[:dim]) == 1:
                return Stored(TensorInfo(a.info.dtype, shape), a.file, a.offset)
        case Narrow(), Narrow():
            if a.dim == dim == b.dim and a.start + a.length == b.start and a.source == b.source:
                return narrow(a.source, dim, a.start, length)
        case Filled(), Filled():
            if a.value == b.value and type(a.value) is type(b.value):
                return Filled(TensorInfo(a.info.dtype, shape), a.value)
    return None


def cast(x: LazyTensor, dtype: DType) -> LazyTensor:
    """The same values in `dtype`; a cast to the same dtype, and a lossless one on the way, vanish."""
    if x.info.dtype is dtype:
        return x
    match x:
        case Cast() if widens(x.source.info.dtype, x.dtype):
            return cast(x.source, dtype)
        case Filled() if x.value in (0, 1):
            return Filled(TensorInfo(dtype, x.info.shape), x.value)
        case _:
            return Cast(x, dtype)


def apply(kernel: KernelSpec, inputs: Sequence[LazyTensor], params: Mapping[str, Param]) -> LazyTensor:
    """The result of a kernel; its dtype and shape are those that the kernel declares for these inputs."""
    given = tuple(inputs)
    return Apply(kernel.name, given, tuple(sorted(params.items())), kernel.info(tuple(i.info for i in given), params))


def recast(x: LazyTensor, dtype: DType) -> LazyTensor:
    """Like `cast`, but rounded once: a kernel is asked for `dtype` itself, and a cast on the way is skipped."""
    match x:
        case Apply():
            spec = kernel_specs.find(x.kernel)
            return apply(spec, x.inputs, dict(x.params) | {"out": dtype.value}) if spec.rounds else cast(x, dtype)
        case Cast():
            return recast(x.source, dtype)
        case Concat():
            return concat([recast(p, dtype) for p in x.parts], x.dim)
        case Narrow():
            return narrow(recast(x.source, dtype), x.dim, x.start, x.length)
        case Reshape():
            return reshape(recast(x.source, dtype), x.shape)
        case Stored() | Strided() | Filled():
            return cast(x, dtype)
        case _:
            assert_never(x)


def rows(x: LazyTensor, start: int, stop: int) -> LazyTensor:
    """Rows `[start, stop)`; a 0-d tensor has one row."""
    return x if not x.info.shape else narrow(x, 0, start, stop - start)


def _is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True
