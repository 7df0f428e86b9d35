"""Declarations of the kernels that dequantise, without torch: integers or codes of a table, times a scale.

Each makes one product in fp32 and rounds it once to the parameter `out`. A range of rows may begin inside a block: the
parameter `first` says how far (rows, or elements of a flat run), and changes with the range (`KernelSpec.cut`).
"""

from __future__ import annotations

import math

from converter.core.tensors.dtypes import DType, TensorInfo
from converter.core.tensors.kernel_specs import Infos, KernelSpec, Params, Slice

_BODIES = "converter.core.compute.dequantising"
_WORD = 32


def _int(params: Params, key: str) -> int:
    value = params[key]
    assert isinstance(value, int)
    return value


def _shape(params: Params) -> tuple[int, ...]:
    value = params["shape"]
    assert isinstance(value, tuple)
    return tuple(int(n) for n in value)


def _out(params: Params) -> DType:
    return DType(params["out"])


def _span(start: int, stop: int, block: int, first: int) -> tuple[int, int]:
    """The first block that positions `[start, stop)` touch, and how many they touch."""
    begin = (first + start) // block
    return begin, -(-(first + stop) // block) - begin


# Blocks of a matrix


def _block_needs(start: int, stop: int, inputs: Infos, params: Params) -> tuple[Slice | None, ...]:
    rows = Slice(0, start, stop - start)
    if len(inputs[0].shape) > 2:
        return tuple(rows for _ in inputs)
    begin, count = _span(start, stop, _int(params, "rows"), _int(params, "first"))
    return (rows, *(Slice(0, begin, count) for _ in inputs[1:]))


def _block_cut(start: int, stop: int, inputs: Infos, params: Params) -> Params:
    if len(inputs[0].shape) > 2:
        return params
    return {**params, "first": (_int(params, "first") + start) % _int(params, "rows")}


DEQUANTISE_BLOCKS = KernelSpec(
    "dequantise-blocks",
    f"{_BODIES}:blocks",
    lambda inputs, params: TensorInfo(_out(params), inputs[0].shape),
    _block_needs,
    lambda inputs, params: 12 * inputs[0].numel,
    rounds=True,
    cut=_block_cut,
    on_device=True,
)
"""`(W - Z) * S`, each scale for a block of the matrix. Inputs: W `[..., out, in]` of any type; S `[..., rows of blocks,
columns of blocks]`; with `zero`, Z of S's shape. Params: `rows` and `columns` of a block, `first`, `zero`, `out`."""


# Flat runs of blocks: bitsandbytes


def _flat(params: Params) -> tuple[int, int, int]:
    """Elements of a row, elements of a block, and where in the first block the first element lies."""
    return math.prod(_shape(params)[1:]), _int(params, "block"), _int(params, "first")


def _four_bit_needs(start: int, stop: int, inputs: Infos, params: Params) -> tuple[Slice | None, ...]:
    row, block, first = _flat(params)
    begin, count = _span(start * row, stop * row, block, first)
    low = begin * block // 2
    high = -(-(first + stop * row) // 2)
    return Slice(0, low, high - low), Slice(0, begin, count)


def _four_bit_cut(start: int, stop: int, inputs: Infos, params: Params) -> Params:
    row, block, first = _flat(params)
    return {**params, "first": (first + start * row) % block, "shape": (stop - start, *_shape(params)[1:])}


DEQUANTISE_FOUR_BIT = KernelSpec(
    "dequantise-four-bit",
    f"{_BODIES}:four_bit",
    lambda inputs, params: TensorInfo(_out(params), _shape(params)),
    _four_bit_needs,
    lambda inputs, params: 16 * math.prod(_shape(params)) + 8 * _int(params, "block"),
    rounds=True,
    cut=_four_bit_cut,
    on_device=True,
)
"""bitsandbytes' 4 bits: `table[code] * absmax`, the high half of a byte first. Inputs: the bytes, flat; absmax fp32,
one for each block of the flat run. Params: `table` (`nf4` or `fp4`), `block` (elements), `first`, `shape`, `out`."""


def _absmax_needs(start: int, stop: int, inputs: Infos, params: Params) -> tuple[Slice | None, ...]:
    begin, count = _span(start, stop, _int(params, "block"), _int(params, "first"))
    return Slice(0, start, stop - start), Slice(0, begin, count), None


DEQUANTISE_ABSMAX = KernelSpec(
    "dequantise-absmax",
    f"{_BODIES}:absmax",
    lambda inputs, params: TensorInfo(DType.F32, inputs[0].shape),
    _absmax_needs,
    lambda inputs, params: 16 * inputs[0].numel,
    cut=lambda start, stop, inputs, params: {
        **params,
        "first": (_int(params, "first") + start) % _int(params, "block"),
    },
    on_device=True,
)
"""bitsandbytes' double quantisation: `map[code] * absmax + offset`, in fp32. Inputs: codes `[n]` u8, the absmax of the
absmax, the map `[256]`. Params: `offset`, `block`, `first`."""


def _rows_of_all(start: int, stop: int, inputs: Infos, params: Params) -> tuple[Slice | None, ...]:
    return tuple(Slice(0, start, stop - start) for _ in inputs)


DEQUANTISE_INT8 = KernelSpec(
    "dequantise-int8",
    f"{_BODIES}:int8",
    lambda inputs, params: TensorInfo(_out(params), inputs[0].shape),
    _rows_of_all,
    lambda inputs, params: 8 * inputs[0].numel,
    rounds=True,
    on_device=True,
)
"""bitsandbytes' 8 bits: `W * SCB / 127` by rows, in its order of operations. Inputs: W `[out, in]` i8, SCB `[out]`."""


# MXFP4

DEQUANTISE_MXFP4 = KernelSpec(
    "dequantise-mxfp4",
    f"{_BODIES}:mxfp4",
    lambda inputs, params: TensorInfo(
        _out(params), (inputs[0].shape[0], inputs[0].shape[2] * 2 * inputs[0].shape[3], inputs[0].shape[1])
    ),
    _rows_of_all,
    lambda inputs, params: 40 * inputs[0].numel // max(inputs[0].shape[0], 1),
    rounds=True,
    on_device=True,
)
"""gpt-oss' experts: `e2m1[code] * 2^(scale - 127)`, the low half of a byte first, transposed. Inputs: blocks
`[E, R, G, 16]` u8, scales `[E, R, G]` u8; result `[E, 32 G, R]`. Params: `out`."""


def _group_needs(start: int, stop: int, inputs: Infos, params: Params) -> tuple[Slice | None, ...]:
    rows = Slice(0, start, stop - start)
    return (rows, rows, *(None for _ in inputs[2:]))


DEQUANTISE_FOUR_BIT_FLOATS = KernelSpec(
    "dequantise-four-bit-floats",
    f"{_BODIES}:four_bit_floats",
    lambda inputs, params: TensorInfo(_out(params), (inputs[0].shape[0], 2 * inputs[0].shape[1])),
    _group_needs,
    lambda inputs, params: 24 * inputs[0].numel,
    rounds=True,
    on_device=True,
)
"""NVFP4 and MXFP4 of a matrix: `e2m1[code] * scale`, the low half of a byte first. Inputs: codes `[out, in / 2]` u8;
scales `[out, groups]`, in FP8 (then the number `[1]` fp32 that they are divided by) or u8, which are powers of two plus
127. Params: `group`, `out`."""


# Codes packed in words


def _packed_row_needs(start: int, stop: int, inputs: Infos, params: Params) -> tuple[Slice | None, ...]:
    rows = Slice(0, start, stop - start)
    begin, count = _span(start, stop, _WORD // _int(params, "bits"), _int(params, "first"))
    return (rows, rows, *(Slice(0, begin, count) for _ in inputs[2:]))


DEQUANTISE_PACKED_ROWS = KernelSpec(
    "dequantise-packed-rows",
    f"{_BODIES}:packed_rows",
    lambda inputs, params: TensorInfo(_out(params), (inputs[0].shape[0], _int(params, "columns"))),
    _packed_row_needs,
    lambda inputs, params: 20 * inputs[0].shape[0] * _int(params, "columns"),
    rounds=True,
    cut=lambda start, stop, inputs, params: {
        **params,
        "first": (_int(params, "first") + start) % (_WORD // _int(params, "bits")),
    },
    on_device=True,
)
"""Words along a row, low bits first: `(code - zero) * scale`. Inputs: words `[out, words]` i32, scales `[out, groups]`,
and zero points `[ceil(out * bits / 32), groups]` i32 packed down the rows, where there are some. Codes and zero points
are stored plus 2^(bits-1). Params: `bits`, `columns`, `group`, `first`, `out`."""


def _is_awq(params: Params) -> bool:
    return params["layout"] == "awq"


def _packed_column_needs(start: int, stop: int, inputs: Infos, params: Params) -> tuple[Slice | None, ...]:
    begin, count = _span(start, stop, _WORD // _int(params, "bits"), _int(params, "first"))
    columns, words = Slice(1, start, stop - start), Slice(1, begin, count)
    return (words if _is_awq(params) else columns, words, columns, *(None for _ in inputs[3:]))


def _packed_column_info(inputs: Infos, params: Params) -> TensorInfo:
    inner = inputs[0].shape[0] * (1 if _is_awq(params) else _WORD // _int(params, "bits"))
    return TensorInfo(_out(params), (inputs[2].shape[1], inner))


DEQUANTISE_PACKED_COLUMNS = KernelSpec(
    "dequantise-packed-columns",
    f"{_BODIES}:packed_columns",
    _packed_column_info,
    _packed_column_needs,
    lambda inputs, params: 24 * _packed_column_info(inputs, params).numel,
    rounds=True,
    cut=lambda start, stop, inputs, params: {
        **params,
        "first": (_int(params, "first") + start) % (_WORD // _int(params, "bits")),
    },
    on_device=True,
)
"""GPTQ and AWQ: `((code - zero) * scale)` of `[in, out]`, transposed. Inputs: words, zero points packed along `out`,
scales `[groups, out]`, and with act order the group of each input `[in]` i32. Params: `layout` (`gptq`: words along
`in`; `awq`: along `out`, interleaved), `bits`, `group`, `zero` (added to a stored zero point), `first`, `out`."""


# Back into MXFP4

_GROUP = 32
"""Codes under one scale."""


def _mx_shape(inputs: Infos) -> tuple[int, int, int]:
    experts, inner, rows = inputs[0].shape
    return experts, rows, inner // _GROUP


QUANTISE_MXFP4_SCALES = KernelSpec(
    "quantise-mxfp4-scales",
    f"{_BODIES}:mxfp4_scales",
    lambda inputs, params: TensorInfo(DType.U8, _mx_shape(inputs)),
    _rows_of_all,
    lambda inputs, params: 8 * inputs[0].numel // max(inputs[0].shape[0], 1),
    on_device=True,
)
"""The exponent of each group of 32: the power of two that is the largest magnitude over 6 or just above it. Input: W
`[E, 32 G, R]` fp32; result `[E, R, G]`."""

QUANTISE_MXFP4_BLOCKS = KernelSpec(
    "quantise-mxfp4-blocks",
    f"{_BODIES}:mxfp4_blocks",
    lambda inputs, params: TensorInfo(DType.U8, (*_mx_shape(inputs), _GROUP // 2)),
    _rows_of_all,
    lambda inputs, params: 48 * inputs[0].numel // max(inputs[0].shape[0], 1),
    on_device=True,
)
"""The nearest e2m1 number of each value under its group's scale, ties away from zero, two codes a byte, the low half
first. Inputs: W `[E, 32 G, R]` fp32; then, for what the update leaves of itself, the weight before it."""


# Back into FP8


def _grid(inputs: Infos, params: Params) -> tuple[int, int]:
    rows, columns = inputs[0].shape
    return -(-rows // _int(params, "rows")), -(-columns // _int(params, "columns"))


def _scale_needs(start: int, stop: int, inputs: Infos, params: Params) -> tuple[Slice | None, ...]:
    block, height = _int(params, "rows"), inputs[0].shape[0]
    return (Slice(0, start * block, min(stop * block, height) - start * block),)


QUANTISE_FP8_SCALES = KernelSpec(
    "quantise-fp8-scales",
    f"{_BODIES}:fp8_scales",
    lambda inputs, params: TensorInfo(_out(params), _grid(inputs, params)),
    _scale_needs,
    lambda inputs, params: 8 * inputs[0].numel,
    on_device=True,
)
"""The scale of each block, largest magnitude over 448, as transformers has it. Input: W `[out, in]` fp32. Params:
`rows` and `columns` of a block, `out`."""


def _code_needs(start: int, stop: int, inputs: Infos, params: Params) -> tuple[Slice | None, ...]:
    block = _int(params, "rows")
    begin, count = _span(start, stop, block, _int(params, "first"))
    rows = Slice(0, begin * block, min((begin + count) * block, inputs[0].shape[0]) - begin * block)
    return tuple(rows for _ in inputs)


QUANTISE_FP8_CODES = KernelSpec(
    "quantise-fp8-codes",
    f"{_BODIES}:fp8_codes",
    lambda inputs, params: TensorInfo(DType.F8_E4M3, (_int(params, "count"), inputs[0].shape[1])),
    _code_needs,
    lambda inputs, params: 24 * inputs[0].numel,
    cut=lambda start, stop, inputs, params: {
        **params,
        "first": (_int(params, "first") + start) % _int(params, "rows"),
        "count": stop - start,
    },
    on_device=True,
)
"""The nearest FP8 number of each value under its block's scale. Inputs: W `[out, in]` fp32, whole blocks of rows; then,
for what the update leaves of itself, the weight before it and its codes. Params: as of the scales, `out` being their
dtype; `first` and `count`, the rows that are wanted."""
