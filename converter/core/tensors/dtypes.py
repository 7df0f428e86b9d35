"""Element types and shapes, in safetensors' own words; no torch.

Source of names and widths: https://github.com/huggingface/safetensors/blob/v0.8.0/safetensors/src/tensor.rs
"""

from __future__ import annotations

import enum
import math
import re
from dataclasses import dataclass
from typing import Protocol

from converter.errors import UsageError
from converter.text import show


class DType(enum.Enum):
    """An element type; its value is the name that a safetensors header uses."""

    BOOL = "BOOL"
    F4 = "F4"
    F6_E2M3 = "F6_E2M3"
    F6_E3M2 = "F6_E3M2"
    U8 = "U8"
    I8 = "I8"
    F8_E5M2 = "F8_E5M2"
    F8_E4M3 = "F8_E4M3"
    F8_E8M0 = "F8_E8M0"
    F8_E4M3FNUZ = "F8_E4M3FNUZ"
    F8_E5M2FNUZ = "F8_E5M2FNUZ"
    I16 = "I16"
    U16 = "U16"
    F16 = "F16"
    BF16 = "BF16"
    I32 = "I32"
    U32 = "U32"
    F32 = "F32"
    C64 = "C64"
    F64 = "F64"
    I64 = "I64"
    U64 = "U64"

    @property
    def bits(self) -> int:
        """Width of one element in bits."""
        return _BITS[self._value_]

    @property
    def is_float(self) -> bool:
        """True for real floating-point types of any width."""
        return self.value[0] == "F" or self is DType.BF16

    @property
    def torch_name(self) -> str:
        """The name of torch's dtype (`bfloat16`), or of the safetensors type where torch has none."""
        return _TORCH_NAMES.get(self, self.value)

    @classmethod
    def parse(cls, text: str) -> DType:
        """The type that a user or a config means: `bf16`, `bfloat16`, `torch.bfloat16` and `BF16` are one.

        Raises:
            UsageError: the text names no known type.
        """
        key = text.strip().removeprefix("torch.").lower()
        if key in _ALIASES:
            return _ALIASES[key]
        raise UsageError(
            "unknown-dtype", f"`{show(text)}` is not a dtype", expected="a name such as bf16, fp16, fp32 or bfloat16"
        )


_BITS = {name: int((re.findall(r"\d+", name) or ["8"])[0]) for name in (d.value for d in DType)}
"""By name: an enumeration's own hash is slow, and a plan asks for this a million times."""

_TORCH_NAMES = {
    DType.BOOL: "bool",
    DType.U8: "uint8",
    DType.I8: "int8",
    DType.F8_E5M2: "float8_e5m2",
    DType.F8_E4M3: "float8_e4m3fn",
    DType.F8_E8M0: "float8_e8m0fnu",
    DType.F8_E4M3FNUZ: "float8_e4m3fnuz",
    DType.F8_E5M2FNUZ: "float8_e5m2fnuz",
    DType.I16: "int16",
    DType.U16: "uint16",
    DType.F16: "float16",
    DType.BF16: "bfloat16",
    DType.I32: "int32",
    DType.U32: "uint32",
    DType.F32: "float32",
    DType.C64: "complex64",
    DType.F64: "float64",
    DType.I64: "int64",
    DType.U64: "uint64",
}

_ALIASES = (
    {d.value.lower(): d for d in DType}
    | {name: d for d, name in _TORCH_NAMES.items()}
    | {
        "fp16": DType.F16,
        "half": DType.F16,
        "fp32": DType.F32,
        "float": DType.F32,
        "fp64": DType.F64,
        "double": DType.F64,
    }
)


LOSSLESS = {
    DType.BF16: {DType.F32, DType.F64},
    DType.F16: {DType.F32, DType.F64},
    DType.F32: {DType.F64},
    DType.F8_E4M3: {DType.F16, DType.BF16, DType.F32, DType.F64},
    DType.F8_E5M2: {DType.F16, DType.BF16, DType.F32, DType.F64},
    DType.U8: {DType.I16, DType.I32, DType.I64},
    DType.I8: {DType.I16, DType.I32, DType.I64},
    DType.I16: {DType.I32, DType.I64},
    DType.I32: {DType.I64},
}
"""Dtypes that hold every value of another."""


def widens(source: DType, dtype: DType) -> bool:
    """True where every value of `source` is exactly one of `dtype`, another type."""
    return dtype in LOSSLESS.get(source, ())


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a header says of a tensor: its element type and shape (`()` is a 0-d tensor of one element)."""

    dtype: DType
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the data, contiguous. Types narrower than a byte are packed; a header guarantees whole bytes."""
        return (self.numel * self.dtype.bits + 7) // 8

    @property
    def row_bytes(self) -> int | None:
        """Bytes of one index of the first dimension; None where rows do not begin at whole bytes."""
        if not self.shape or self.shape[0] == 0:
            return None
        bits = self.numel // self.shape[0] * self.dtype.bits
        return bits // 8 if bits % 8 == 0 else None


class _Described(Protocol):
    @property
    def info(self) -> TensorInfo: ...


class Typed:
    """The element type by its short name; a Cast has it as its own field."""

    __slots__ = ()

    @property
    def dtype(self: _Described) -> DType:
        """The type of the elements."""
        return self.info.dtype


class Shaped:
    """The shape by its short name; a Reshape has it as its own field."""

    __slots__ = ()

    @property
    def shape(self: _Described) -> tuple[int, ...]:
        """The length of each dimension."""
        return self.info.shape
