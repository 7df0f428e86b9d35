"""What may be said of two checkpoints from what is left of one: the same step, another one, or another model.

Values decide where they can. A norm of a bf16 model proves little: its values near one move by less than a rounding
step in whole runs, so it is equal in the base model too. Steps are inferred from names and from what the trainer
recorded.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

from converter.core.checkpoint import Checkpoint
from converter.core.context import Context
from converter.core.files.names import TRAINER_STATE
from converter.core.files.strict_json import load_json
from converter.core.tensors import nodes as tensors
from converter.core.tensors.byte_runs import byte_runs
from converter.core.tensors.dtypes import DType
from converter.core.tensors.nodes import Cast, LazyTensor
from converter.errors import Refused

Relation = Literal["same", "other", "unknown"]

COMPARED = 1 << 17
"""Elements of a tensor that are compared where one side has to be rounded first, which is done in plain Python."""

_STEP = re.compile(r"(?:checkpoint|global_step|step|iter)[-_]?(\d{1,15})", re.ASCII)
_FORMATS = frozenset({DType.F32, DType.BF16, DType.F16})


def is_empty(tensor: LazyTensor) -> bool:
    """True for `torch.Size([0])`, what ZeRO-3 leaves of a parameter that was not gathered."""
    return tensor.info.shape == (0,)


def is_comparable(tensor: LazyTensor) -> bool:
    """True where the values lie in files row by row, if still to be rounded: shards of columns don't."""
    while isinstance(tensor, Cast):
        if tensor.dtype not in _FORMATS or tensor.source.info.dtype not in _FORMATS:
            return False
        tensor = tensor.source
    return byte_runs(tensor) is not None


def step_of(path: str, *, state: bool = False) -> int | None:
    """The step of a checkpoint, by the name of its folder or of the nearest above it, three levels at most.

    Args:
        state: ask the trainer's own record in the folder too, where no name tells.
    """
    folder = Path(path)
    for each in (folder, *list(folder.parents)[:2]):
        if match := _STEP.fullmatch(each.name):
            return int(match[1])
    if state and (folder / TRAINER_STATE).is_file():
        try:
            value = load_json(folder / TRAINER_STATE, allow_nan=True)
        except Refused:
            return None
        step = value.get("global_step") if isinstance(value, dict) else None
        return step if type(step) is int else None
    return None


def step_relation(broken: Checkpoint, other: Checkpoint) -> Relation:
    """Whether both were saved after the same step, as far as names and records say."""
    ours, theirs = step_of(broken.origin.path, state=True), step_of(other.origin.path, state=True)
    if ours is None or theirs is None:
        return "unknown"
    return "same" if ours == theirs else "other"


def differing(context: Context, ours: Mapping[str, LazyTensor], theirs: Mapping[str, LazyTensor]) -> list[str]:
    """Names of the tensors that both hold whole and with different values."""
    return [n for n in whole_in_both(ours, theirs) if not same(context, ours[n], theirs[n])]


def whole_in_both(ours: Mapping[str, LazyTensor], theirs: Mapping[str, LazyTensor]) -> list[str]:
    """Names of the tensors that both hold, in one shape, and whose values can be compared."""
    both = [n for n, t in ours.items() if n in theirs and t.info.numel and t.info.shape == theirs[n].info.shape]
    return [n for n in both if is_comparable(ours[n]) and is_comparable(theirs[n])]


def same(context: Context, a: LazyTensor, b: LazyTensor) -> bool:
    """True where `b`, rounded to the dtype of `a`, has its values bit by bit.

    Stored tensors are compared whole. Where one is still to be rounded (fp32 masters of a bf16 model) the first
    `COMPARED` elements are.
    """
    if a.info.shape != b.info.shape:
        return False
    if a.info.dtype is not b.info.dtype and not {a.info.dtype, b.info.dtype} <= _FORMATS:
        return False
    b = tensors.cast(b, a.info.dtype)
    if not isinstance(a, Cast) and not isinstance(b, Cast):
        return context.equal(a, b)
    return _rounded(context, a) == _rounded(context, b)


def _rounded(context: Context, x: LazyTensor) -> bytes:
    """The first elements of a tensor in its dtype."""
    chain: list[DType] = []
    while isinstance(x, Cast):
        chain.insert(0, x.dtype)
        x = x.source
    count = min(math.prod(x.info.shape), COMPARED)
    raw = context.read(tensors.narrow(tensors.reshape(x, (x.info.numel,)), 0, 0, count))
    dtype = x.info.dtype
    for after in chain:
        raw = _cast(raw, dtype, after)
        dtype = after
    return raw


def _cast(raw: bytes, before: DType, after: DType) -> bytes:
    """Little-endian floats in another format, rounded to nearest even as torch does."""
    if before is after:
        return raw
    if before is DType.BF16:
        return _cast(_packed("I", [h << 16 for h in _unpacked("H", raw)]), DType.F32, after)
    if before is DType.F16:
        values = struct.unpack(f"<{len(raw) // 2}e", raw)
        return _cast(struct.pack(f"<{len(values)}f", *values), DType.F32, after)
    if after is DType.F16:
        return b"".join(_half(v) for v in struct.unpack(f"<{len(raw) // 4}f", raw))
    return _packed("H", [_brain(b) for b in _unpacked("I", raw)])


def _brain(bits: int) -> int:
    """The upper half of fp32 bits, rounded to nearest even; NaN as torch writes it."""
    if bits & 0x7FFFFFFF > 0x7F800000:
        return 0x7FC0
    return (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16


def _half(value: float) -> bytes:
    try:
        return struct.pack("<e", value)
    except OverflowError:
        return struct.pack("<e", math.copysign(math.inf, value))


def _unpacked(code: str, raw: bytes) -> tuple[int, ...]:
    return struct.unpack(f"<{len(raw) // struct.calcsize(code)}{code}", raw)


def _packed(code: str, values: Iterable[int]) -> bytes:
    listed = list(values)
    return struct.pack(f"<{len(listed)}{code}", *listed)
