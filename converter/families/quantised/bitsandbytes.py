"""bitsandbytes: NF4 and FP4, plain or with double quantisation, and int8.

A 4-bit weight is one flat run of blocks: its shape, and what it is a run of, are JSON in a tensor of bytes.

Source: https://github.com/bitsandbytes-foundation/bitsandbytes/blob/0.50.2/bitsandbytes/functional.py (`QuantState`)
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from converter.core.context import Context
from converter.core.tensors import nodes
from converter.core.tensors import quantised_specs as kernels
from converter.core.tensors.dtypes import DType, TensorInfo
from converter.core.tensors.nodes import LazyTensor, Stored
from converter.errors import ConvertError, Refused
from converter.families.quantised.weight import (
    Fault,
    Format,
    Found,
    Infos,
    Weight,
    misshapen,
    missing,
    mistyped,
    orphan,
)
from converter.text import show

_STATE = ".quant_state.bitsandbytes__"
_TABLES = ("nf4", "fp4")
_ASCENDING = "nf4"
_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_USUAL_BLOCK = 64
_CODES, _ENTRIES = 256, 16
_FLOATS = (DType.F32, DType.BF16, DType.F16)
_LEAST_STATE = {False: 64, True: 120}
"""Bytes of the JSON of a `quant_state`, without and with double quantisation: its keys alone are nearly as many."""


def find_four_bit(infos: Infos, config: Mapping[str, Any]) -> Iterator[Found]:
    """Weights that have a `quant_state`, and parts of such weights without one."""
    seen: set[str] = set()
    found: list[Found] = []
    for name in infos:
        if _STATE in name:
            weight, _, table = name.partition(_STATE)
            seen.add(weight)
            found.append(_four_bit(infos, weight, table, name))
    yield from _of_one_block_size(found)
    for name, info in infos.items():
        weight, _, part = name.rpartition(".")
        if part in ("absmax", "quant_map", "nested_absmax", "nested_quant_map") and weight not in seen:
            seen.add(weight)
            yield missing(weight, f"{weight}{_STATE}nf4") if weight in infos else orphan(name, weight)
        is_packed = info.dtype is DType.U8 and len(info.shape) == 2 and info.shape[1] == 1 and name.endswith(".weight")
        if is_packed and name not in seen and not any(_STATE in n and n.startswith(name) for n in infos):
            seen.add(name)
            yield missing(name, f"{name}{_STATE}nf4")


def _of_one_block_size(found: Sequence[Found]) -> Iterator[Found]:
    """A model's weights are in blocks of one size, which no header says: one of another size has lost some."""
    sizes = [b for each in found if isinstance(each, Weight) for b in each.params["blocks"]]
    block = max(_BLOCKS, key=lambda b: (sizes.count(b), b == _USUAL_BLOCK))
    for each in found:
        if isinstance(each, Weight) and block not in each.params["blocks"]:
            parts = f"{show(each.parts['absmax'])} of {show(each.name)}"
            yield Fault(each.name, f"{parts} is not one for each {block} elements, as in the other weights")
        else:
            yield each


def _four_bit(infos: Infos, weight: str, table: str, state: str) -> Found:
    if table not in _TABLES:
        return Fault(state, f"{show(state)}: bitsandbytes has no 4-bit type {show(table)}")
    parts = {"weight": weight, "absmax": f"{weight}.absmax", "quant_map": f"{weight}.quant_map"}
    is_nested = f"{weight}.nested_absmax" in infos or f"{weight}.nested_quant_map" in infos
    if is_nested:
        parts |= {"nested_absmax": f"{weight}.nested_absmax", "nested_quant_map": f"{weight}.nested_quant_map"}
    for part in parts.values():
        if part not in infos:
            return missing(weight, part)
    absmax = infos[parts["absmax"]]
    if absmax.dtype not in ((DType.U8,) if is_nested else _FLOATS):
        asked = "u8, as double quantisation has it" if is_nested else "f32"
        return Fault(weight, f"{show(parts['absmax'])} is {absmax.dtype.value}, and {asked} is expected")
    for part, count in (("quant_map", _ENTRIES), ("nested_quant_map", _CODES)):
        if part in parts and infos[parts[part]].shape != (count,):
            return misshapen(weight, parts[part], infos[parts[part]].shape, (count,))
    for part in ("quant_map", "nested_quant_map", "nested_absmax"):
        if part in parts and infos[parts[part]].dtype not in _FLOATS:
            return mistyped(weight, parts[part], infos[parts[part]].dtype, "f32")
    held = infos[state]
    if held.dtype is not DType.U8 or len(held.shape) != 1:
        return mistyped(weight, state, held.dtype, "u8")
    if held.numel < _LEAST_STATE[is_nested]:
        return misshapen(weight, state, held.shape, f"{_LEAST_STATE[is_nested]} bytes of JSON or more")
    size = infos[weight].nbytes
    count = absmax.numel
    blocks = tuple(b for b in _BLOCKS if count in (-(-2 * size // b), -(-(2 * size - 1) // b)))
    if not blocks:
        return misshapen(weight, parts["absmax"], absmax.shape, f"one for each block of {2 * size} elements")
    scheme = table.upper() + (", doubly quantised" if is_nested else "")
    return Weight(weight, scheme, {**parts, "state": state}, None, (2 * size - 1, 2 * size), params={"blocks": blocks})


def whole_four_bit(weight: Weight, parts: Mapping[str, LazyTensor], dtype: DType, context: Context) -> LazyTensor:
    """`table[code] * absmax`, rounded to the dtype that the weight had, then to the model's.

    Raises:
        Refused: the state does not go with the parts, or the map is not the type's (`quantised-incomplete`).
    """
    state = _state(weight, parts["state"], context)
    shape, block, own = state["shape"], state["blocksize"], state["dtype"]
    table = weight.parts["state"].partition(_STATE)[2]
    count = math.prod(shape)
    packed, absmax = _bytes(weight, parts["weight"]), parts["absmax"]
    if table == _ASCENDING:
        _expect_ordered(weight, "quant_map", parts, context)
    if packed.info.numel != (count + 1) // 2 or absmax.info.numel != -(-count // block):
        raise _refused(weight, f"its state says {list(shape)} in blocks of {block}, which its parts do not hold")
    absmax = nodes.reshape(absmax, (absmax.info.numel,))
    if "nested_absmax" in parts:
        nested, size = parts["nested_absmax"], state["nested_blocksize"]
        if nested.info.numel != -(-absmax.info.numel // size):
            raise _refused(weight, f"its absmax is in blocks of {size}, and {nested.info.numel} of them are there")
        _expect_ordered(weight, "nested_quant_map", parts, context)
        absmax = nodes.apply(
            kernels.DEQUANTISE_ABSMAX,
            [absmax, nodes.reshape(nested, (nested.info.numel,)), parts["nested_quant_map"]],
            {"offset": state["nested_offset"], "block": size, "first": 0},
        )
    params: dict[str, Any] = {"table": table, "block": block, "first": 0, "shape": tuple(shape), "out": own.value}
    return nodes.cast(nodes.apply(kernels.DEQUANTISE_FOUR_BIT, [packed, absmax], params), dtype)


def _expect_ordered(weight: Weight, part: str, parts: Mapping[str, LazyTensor], context: Context) -> None:
    """NF4's table, and every one that bitsandbytes makes for the scales of scales, goes up from -1 or more to 1.

    Raises:
        Refused: this one does not (`quantised-incomplete`).
    """
    table = parts[part]
    if table.info.dtype is not DType.F32:
        return
    numbers = struct.unpack(f"<{table.info.numel}f", context.read(table))
    if not all(a < b for a, b in pairwise(numbers)) or not -1.01 < numbers[0] < numbers[-1] < 1.01:
        raise _refused(weight, f"its {part} does not go up to 1, as each of bitsandbytes' tables does")


def _bytes(weight: Weight, packed: LazyTensor) -> LazyTensor:
    """The packed codes as bytes: `bnb_4bit_quant_storage` keeps the same bytes under another type.

    Raises:
        Refused: they are of another type and do not lie in one piece (`quantised-incomplete`).
    """
    if packed.info.dtype is DType.U8:
        return nodes.reshape(packed, (packed.info.numel,))
    if not isinstance(packed, Stored):
        raise _refused(weight, "its codes are kept as floats, and do not lie in one piece")
    return nodes.stored(TensorInfo(DType.U8, (packed.info.nbytes,)), packed.file, packed.offset)


def _state(weight: Weight, tensor: LazyTensor, context: Context) -> dict[str, Any]:
    """What the JSON of a `quant_state` says, checked.

    Raises:
        Refused: it is not one (`quantised-incomplete`).
    """
    try:
        held = json.loads(context.read(tensor, max_bytes=1 << 16))
        shape = [int(n) for n in held["shape"]]
        state: dict[str, Any] = {
            "shape": shape,
            "blocksize": int(held["blocksize"]),
            "dtype": DType.parse(str(held["dtype"])),
        }
        if "nested_blocksize" in held:
            state |= {
                "nested_blocksize": int(held["nested_blocksize"]),
                "nested_offset": float(held["nested_offset"]),
            }
        kind = str(held["quant_type"])
    except (ValueError, KeyError, TypeError, RecursionError, ConvertError) as error:
        raise _refused(weight, "its quant_state is not one of bitsandbytes") from error
    is_sound = min(shape, default=0) > 0 and state["blocksize"] in _BLOCKS and state.get("nested_blocksize", 1) > 0
    is_sound = is_sound and state["dtype"] in (DType.F16, DType.BF16, DType.F32)
    is_sound = is_sound and math.isfinite(state.get("nested_offset", 0.0))
    if not is_sound or kind != weight.parts["state"].partition(_STATE)[2]:
        raise _refused(weight, f"its quant_state says {show(kind)} {shape} in blocks of {state['blocksize']}")
    if ("nested_absmax" in weight.parts) != ("nested_blocksize" in state):
        raise _refused(weight, "its quant_state and its tensors disagree about double quantisation")
    return state


def _refused(weight: Weight, text: str) -> Refused:
    return Refused("quantised-incomplete", f"{show(weight.name)}: {text}")


def find_int8(infos: Infos, config: Mapping[str, Any]) -> Iterator[Found]:
    """Weights that have an `SCB`, and int8 weights without one."""
    for name, info in infos.items():
        if name.endswith(".SCB"):
            yield _int8(infos, name.removesuffix(".SCB"), name)
        elif info.dtype is DType.I8 and name.endswith(".weight") and f"{name.removesuffix('.weight')}.SCB" not in infos:
            yield missing(name, f"{name.removesuffix('.weight')}.SCB")


def _int8(infos: Infos, module: str, scale: str) -> Found:
    weight, layout = f"{module}.weight", f"{module}.weight_format"
    held = infos.get(weight)
    if held is None or held.dtype is not DType.I8 or len(held.shape) != 2:
        return orphan(scale, weight)
    if infos[scale].shape != held.shape[:1]:
        return misshapen(weight, scale, infos[scale].shape, held.shape[:1])
    if infos[scale].dtype not in _FLOATS:
        return mistyped(weight, scale, infos[scale].dtype, "f32")
    parts = {"weight": weight, "scale": scale} | ({"format": layout} if layout in infos else {})
    return Weight(weight, "int8 of bitsandbytes", parts, held.shape)


def whole_int8(weight: Weight, parts: Mapping[str, LazyTensor], dtype: DType, context: Context) -> LazyTensor:
    """`W * SCB / 127`.

    Raises:
        Refused: the layout is a GPU's, which bitsandbytes refuses, and transformers takes for rows
            (`quantised-incomplete`).
    """
    if "format" in parts and context.read(parts["format"], max_bytes=8).strip(b"\0"):
        what = (
            f"{show(weight.name)}: its weight_format is the layout of one kind of GPU, which bitsandbytes refuses; "
            "transformers takes it for rows, and reads other numbers"
        )
        raise Refused("quantised-incomplete", what)
    return nodes.apply(kernels.DEQUANTISE_INT8, [parts["weight"], parts["scale"]], {"out": dtype.value})


FOUR_BIT = Format(
    find_four_bit,
    whole_four_bit,
    "NF4 and FP4, plain and doubly quantised",
    "bitsandbytes 0.50.2 on a CPU; the sign of FP4's zero is its table's",
)
INT8 = Format(find_int8, whole_int8, "int8", "bitsandbytes 0.50.2 on a CPU")
