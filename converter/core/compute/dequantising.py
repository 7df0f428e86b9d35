"""Bodies of the kernels that dequantise: what each vendor's own code gives, to the bit, from a few lines of torch.

Sources:
https://github.com/bitsandbytes-foundation/bitsandbytes/blob/0.50.2/bitsandbytes/functional.py
https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/integrations/finegrained_fp8.py and `mxfp4.py`
https://github.com/vllm-project/compressed-tensors/blob/0.20.0/src/compressed_tensors/compressors
https://github.com/ModelCloud/GPTQModel/blob/f4c327a1/gptqmodel/utils/model_dequant.py
https://github.com/casper-hansen/AutoAWQ/blob/88e4c76/awq/utils/packing_utils.py
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from converter.core.compute.evaluate import torch_dtype
from converter.core.compute.kernels import measured
from converter.core.compute.measures import Measures
from converter.core.tensors.dtypes import DType

_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_FP4_HALF = (
    0.0, 0.0052083334885537624, 0.6666666865348816, 1.0, 0.3333333432674408, 0.5, 0.1666666716337204, 0.25,
)  # fmt: skip
_E2M1_HALF = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E2M1_BETWEEN = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
"""Halfway between neighbours; a value that lies there takes the larger, as gpt-oss' packer has it."""

_MX_GROUP = 32
_TABLES = {
    "nf4": _NF4,
    "fp4": (*_FP4_HALF, *(0.0 - v for v in _FP4_HALF)),
    "e2m1": (*_E2M1_HALF, *(-v for v in _E2M1_HALF)),
}
_FP8_MAX = 448.0
_INT8_STEP = 7.874015718698502e-3
"""1/127 as bitsandbytes writes it."""

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_WORD = 32


def _out_dtype(params: Mapping[str, Any]) -> torch.dtype:
    return torch_dtype(DType(params["out"]))


_HALF = 64
"""Half of the largest exponent of a block's scale."""


@cache
def _powers(device: torch.device) -> Tensor:
    """Powers of two from 2^-64 to 2^64, fp32."""
    return torch.tensor([2.0**n for n in range(-_HALF, _HALF + 1)], dtype=torch.float32, device=device)


@cache
def _pairs(table: str, high_first: bool, device: torch.device) -> Tensor:
    """Both values of each byte, `[256, 2]` fp32."""
    values = torch.tensor(_TABLES[table], dtype=torch.float32, device=device)
    byte = torch.arange(256, device=device)
    high, low = values[byte >> 4], values[byte & 15]
    return torch.stack((high, low) if high_first else (low, high), dim=1)


def _looked_up(codes: Tensor, table: str, *, high_first: bool) -> Tensor:
    """The values of packed bytes, two for each, flat."""
    return _pairs(table, high_first, codes.device).index_select(0, codes.reshape(-1).to(torch.int32)).reshape(-1)


def _spread(grid: Tensor, length: int, block: int, first: int, dim: int) -> Tensor:
    """Each index of a grid repeated over its block; a grid of one is left to broadcasting."""
    if grid.shape[dim] == 1:
        return grid
    return grid.index_select(dim, (torch.arange(length) + first) // block)


def blocks(inputs: list[Tensor], params: Mapping[str, Any]) -> Tensor:
    """Weights with a scale for each block; see `quantised_specs.DEQUANTISE_BLOCKS`."""
    weight = inputs[0].to(torch.float32)
    height, width = weight.shape[-2:]

    def over(grid: Tensor) -> Tensor:
        tall = _spread(grid.to(torch.float32), height, int(params["rows"]), int(params["first"]), grid.dim() - 2)
        return _spread(tall, width, int(params["columns"]), 0, grid.dim() - 1)

    if params["zero"]:
        weight -= over(inputs[2])
    weight *= over(inputs[1])
    return weight.to(_out_dtype(params))


def four_bit(inputs: list[Tensor], params: Mapping[str, Any]) -> Tensor:
    """NF4 and FP4; see `quantised_specs.DEQUANTISE_FOUR_BIT`."""
    packed, absmax = inputs
    shape, block, first = tuple(params["shape"]), int(params["block"]), int(params["first"])
    values = _looked_up(packed, str(params["table"]), high_first=True)
    whole = values.shape[0] // block * block
    values[:whole].view(-1, block).mul_(absmax[: whole // block].view(-1, 1))
    if whole < values.shape[0]:
        values[whole:].mul_(absmax[whole // block])
    count = 1
    for size in shape:
        count *= size
    return values[first : first + count].view(shape).to(_out_dtype(params))


def absmax(inputs: list[Tensor], params: Mapping[str, Any]) -> Tensor:
    """Double quantisation's absmax; see `quantised_specs.DEQUANTISE_ABSMAX`."""
    codes, nested, table = inputs
    at = (torch.arange(codes.shape[0]) + int(params["first"])) // int(params["block"])
    product = table.to(torch.float32)[codes.long()] * nested.to(torch.float32)[at]
    return product + torch.tensor(params["offset"], dtype=torch.float32)


def int8(inputs: list[Tensor], params: Mapping[str, Any]) -> Tensor:
    """bitsandbytes' 8 bits; see `quantised_specs.DEQUANTISE_INT8`."""
    weight, scale = inputs
    return (weight.to(torch.float32) * scale.to(torch.float32).view(-1, 1) * _INT8_STEP).to(_out_dtype(params))


def mxfp4(inputs: list[Tensor], params: Mapping[str, Any]) -> Tensor:
    """gpt-oss' experts, one at a time; see `quantised_specs.DEQUANTISE_MXFP4`.

    The power of two is applied in two halves: both are finite, so that a zero stays one under the largest scale.
    """
    packed, scales = inputs
    experts, rows, groups, width = packed.shape
    out = torch.empty((experts, groups * 2 * width, rows), dtype=_out_dtype(params))
    for expert in range(experts):
        exponent = scales[expert].to(torch.int32) - 127
        half = exponent // 2
        values = _looked_up(packed[expert], "e2m1", high_first=False).view(rows, groups, 2 * width)
        for part in (half, exponent - half):
            values *= _powers(part.device)[part + _HALF].unsqueeze(-1)
        out[expert].copy_(values.view(rows, -1).T)
    return out


def four_bit_floats(inputs: list[Tensor], params: Mapping[str, Any]) -> Tensor:
    """NVFP4 and MXFP4 of a matrix; see `quantised_specs.DEQUANTISE_FOUR_BIT_FLOATS`."""
    packed, scale = inputs[:2]
    rows, groups = scale.shape
    values = _looked_up(packed, "e2m1", high_first=False).view(rows, groups, int(params["group"]))
    if len(inputs) > 2:
        values *= (scale.to(torch.float32) / inputs[2]).unsqueeze(-1)
    else:
        exponent = scale.to(torch.int32) - 127
        half = exponent // 2
        for part in (half, exponent - half):
            values *= _powers(part.device)[part + _HALF].unsqueeze(-1)
    return values.view(rows, -1).to(_out_dtype(params))


def _grouped(weight: Tensor) -> Tensor:
    """An expert's matrix `[32 G, R]` by its rows' groups, `[R, G, 32]`."""
    inner, rows = weight.shape
    return weight.T.contiguous().view(rows, inner // _MX_GROUP, _MX_GROUP)


def _mx_exponents(groups: Tensor) -> Tensor:
    """Exponents of the groups' scales with IEEE's bias, by gpt-oss' own packer: rounded up to a power of two.

    Source: `downcast_to_mxfp_torch`, which transformers calls,
    https://github.com/triton-lang/triton/blob/v3.4.0/python/triton_kernels/triton_kernels/numerics_details/mxfp.py
    """
    bits = (groups.abs().amax(-1) / _E2M1_HALF[-1]).view(torch.int32)
    return ((bits + 0x007FFFFF) & 0x7F800000) >> 23


def mxfp4_scales(inputs: list[Tensor], params: Mapping[str, Any]) -> Tensor:
    """Exponents of groups, one expert at a time; see `quantised_specs.QUANTISE_MXFP4_SCALES`."""
    return torch.stack([_mx_exponents(_grouped(each)).to(torch.uint8) for each in inputs[0]])


def mxfp4_blocks(inputs: list[Tensor], params: Mapping[str, Any]) -> tuple[Tensor, Measures]:
    """Codes under the groups' scales, and how far off they are; see `quantised_specs.QUANTISE_MXFP4_BLOCKS`."""
    found: list[Tensor] = []
    said: dict[str, float] = {}
    for expert, weight in enumerate(inputs[0]):
        groups = _grouped(weight)
        exponents = _mx_exponents(groups).unsqueeze(-1)
        scale = (exponents << 23).view(torch.float32)
        scaled = groups * torch.where(scale == 0, 0.0, 1.0 / scale)
        codes = torch.bucketize(scaled.abs(), torch.tensor(_E2M1_BETWEEN), right=True).to(torch.uint8)
        codes += scaled.signbit().to(torch.uint8) << 3
        packed = codes[..., ::2] | (codes[..., 1::2] << 4)
        found.append(packed)
        stored = torch.tensor(_TABLES["e2m1"])[codes.long()].mul_(scale).view(weight.shape[1], -1).T
        error, flat = (stored - weight).flatten(), weight.flatten()
        parts = {"requantised_error": float(torch.dot(error, error)), "requantised": float(torch.dot(flat, flat))}
        if len(inputs) > 1:
            base, stored = inputs[1][expert].to(torch.float32), stored.contiguous()
            parts["codes_changed"] = float(stored.ne(base).sum())  # a value may have several codes
            parts |= measured(base, weight - base, stored, [inputs[0][expert], inputs[1][expert]])
        said = {key: said.get(key, 0.0) + value for key, value in parts.items()}
    return torch.stack(found), said


def _unpacked(words: Tensor, bits: int, dim: int, order: tuple[int, ...] | None = None) -> Tensor:
    """The codes of packed words, low bits first, laid out along `dim`."""
    count = _WORD // bits
    places = range(count) if order is None else [order.index(column) for column in range(count)]
    shifts = torch.tensor([bits * place for place in places], dtype=torch.int32)
    view = [1, 1, 1]
    view[dim + 1] = count
    codes = (words.unsqueeze(dim + 1) >> shifts.view(view)) & ((1 << bits) - 1)
    return codes.flatten(dim, dim + 1)


def packed_rows(inputs: list[Tensor], params: Mapping[str, Any]) -> Tensor:
    """Integers packed along rows; see `quantised_specs.DEQUANTISE_PACKED_ROWS`."""
    words, scale = inputs[:2]
    bits, columns, group = int(params["bits"]), int(params["columns"]), int(params["group"])
    rows = words.shape[0]
    codes = _unpacked(words, bits, 1)[:, :columns]
    offset = 1 << (bits - 1)
    if len(inputs) > 2:
        first = int(params["first"])
        zero = _unpacked(inputs[2], bits, 0)[first : first + rows]
        codes = codes - _spread(zero, columns, group, 0, 1)
    else:
        codes = codes - offset
    return (codes.to(torch.float32) * _spread(scale.to(torch.float32), columns, group, 0, 1)).to(_out_dtype(params))


def packed_columns(inputs: list[Tensor], params: Mapping[str, Any]) -> Tensor:
    """GPTQ and AWQ; see `quantised_specs.DEQUANTISE_PACKED_COLUMNS`."""
    words, zeros, scales = inputs[:3]
    bits, group, first = int(params["bits"]), int(params["group"]), int(params["first"])
    columns = scales.shape[1]
    is_awq = params["layout"] == "awq"
    order = _AWQ_ORDER if is_awq else None
    codes = _unpacked(words, bits, 1 if is_awq else 0, order)
    codes = codes[:, first : first + columns] if is_awq else codes
    zero = _unpacked(zeros, bits, 1, order)[:, first : first + columns]
    zero = (zero + int(params["zero"])) & ((1 << bits) - 1)
    at = inputs[3].long() if len(inputs) > 3 else torch.arange(codes.shape[0]) // group
    whole = (codes - zero[at]).to(torch.float32) * scales.to(torch.float32)[at]
    return whole.to(_out_dtype(params)).T.contiguous()


def _block_scales(weight: Tensor, params: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Of each block the factor before rounding and the scale that is stored, as `Fp8Quantize` of transformers has them.

    A scale that is stored in 16 bits is rounded first: what a loader multiplies by is what the values were divided by.
    """
    rows, columns = int(params["rows"]), int(params["columns"])
    high, wide = -(-weight.shape[0] // rows), -(-weight.shape[1] // columns)
    padded = torch.zeros((high * rows, wide * columns), dtype=weight.dtype)
    padded[: weight.shape[0], : weight.shape[1]] = weight.abs()
    largest = padded.view(high, rows, wide, columns).amax(dim=(1, 3))
    factor = torch.where(largest > 0, _FP8_MAX / torch.where(largest > 0, largest, 1.0), 1.0)
    scale = (1.0 / factor).to(_out_dtype(params))
    return (factor if scale.dtype is torch.float32 else 1.0 / scale.to(torch.float32)), scale


def fp8_scales(inputs: list[Tensor], params: Mapping[str, Any]) -> Tensor:
    """Scales of blocks; see `quantised_specs.QUANTISE_FP8_SCALES`."""
    return _block_scales(inputs[0], params)[1]


def fp8_codes(inputs: list[Tensor], params: Mapping[str, Any]) -> tuple[Tensor, Measures]:
    """Codes under the blocks' scales, and how far off they are; see `quantised_specs.QUANTISE_FP8_CODES`."""
    weight = inputs[0]
    rows, columns, first, count = (int(params[k]) for k in ("rows", "columns", "first", "count"))
    factor, scale = _block_scales(weight, params)

    def over(grid: Tensor) -> Tensor:
        tall = grid.repeat_interleave(rows, 0)[first : first + count]
        return tall.repeat_interleave(columns, 1)[:, : weight.shape[1]]

    wanted = weight[first : first + count]
    codes = (wanted * over(factor)).clamp_(-_FP8_MAX, _FP8_MAX).to(torch.float8_e4m3fn)
    stored = codes.to(torch.float32) * over(scale.to(torch.float32))
    error, flat = (stored - wanted).flatten(), wanted.flatten()
    said = {"requantised_error": float(torch.dot(error, error)), "requantised": float(torch.dot(flat, flat))}
    if len(inputs) == 1:
        return codes, said
    base, old = (each[first : first + count] for each in inputs[1:])
    base = base.to(torch.float32)
    changed = float(codes.view(torch.uint8).ne(old.view(torch.uint8)).sum())
    return codes, {**measured(base, wanted - base, stored, inputs[:2]), **said, "codes_changed": changed}
