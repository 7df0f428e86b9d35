"""Integers packed into words of 32 bits: compressed-tensors' `pack-quantized`, GPTQ and AWQ.

Sources:
https://github.com/vllm-project/compressed-tensors/blob/0.20.0/src/compressed_tensors/compressors/pack_quantized/base.py
https://github.com/ModelCloud/GPTQModel/blob/f4c327a1/gptqmodel/utils/model_dequant.py
https://github.com/casper-hansen/AutoAWQ/blob/88e4c76/awq/modules/linear/gemm.py
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cache, lru_cache
from typing import Any

from converter.core.context import Context
from converter.core.tensors import nodes
from converter.core.tensors import quantised_specs as kernels
from converter.core.tensors.dtypes import DType
from converter.core.tensors.nodes import LazyTensor
from converter.errors import Refused
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

_WORD = 32
_MATRIX = 2
_FLOATS = (DType.F32, DType.BF16, DType.F16)
_MOST_ZEROS = 1 << 26
"""Bytes of packed zero points that are read to see that none of GPTQ's first format has overflowed."""


# compressed-tensors

_PACKED, _SHAPE = ".weight_packed", ".weight_shape"


def find_compressed(infos: Infos, config: Mapping[str, Any]) -> Iterator[Found]:
    """Weights that have a `weight_packed`."""
    for name in infos:
        if name.endswith(_PACKED) and infos[name].dtype is not DType.U8:
            yield _compressed(infos, name, config)
        elif name.endswith(_SHAPE) and f"{name.removesuffix(_SHAPE)}{_PACKED}" not in infos:
            yield orphan(name, f"{name.removesuffix(_SHAPE)}{_PACKED}")


def _bits(config: Mapping[str, Any]) -> set[int]:
    """Widths that the groups of a config have."""
    groups = config.get("config_groups")
    found = set()
    for group in groups.values() if isinstance(groups, Mapping) else ():
        held = group.get("weights") if isinstance(group, Mapping) else None
        bits = held.get("num_bits") if isinstance(held, Mapping) else None
        found |= {bits} if isinstance(bits, int) else set()
    return found


def _group_counts(config: Mapping[str, Any], columns: tuple[int, int]) -> list[tuple[int, int]]:
    """The least and the most groups of a row of so many columns, for each group of a config; nothing where one of them
    says no size.
    """
    groups = config.get("config_groups")
    found = []
    for group in groups.values() if isinstance(groups, Mapping) else ():
        held = group.get("weights") if isinstance(group, Mapping) else None
        held = held if isinstance(held, Mapping) else {}
        size = held.get("group_size")
        if held.get("strategy") in ("channel", "tensor"):
            found.append((1, 1))
        elif held.get("strategy") == "group" and type(size) is int and size > 0:
            found.append((-(-columns[0] // size), -(-columns[1] // size)))
        else:
            return []
    return found


def _compressed(infos: Infos, packed: str, config: Mapping[str, Any]) -> Found:
    module = packed.removesuffix(_PACKED)
    weight, scale, shape = f"{module}.weight", f"{module}.weight_scale", f"{module}{_SHAPE}"
    zero = f"{module}.weight_zero_point"
    for part in (scale, shape):
        if part not in infos:
            return missing(packed, part)
    bits = _bits(config)
    if len(bits) != 1 or not bits <= {2, 4, 8}:
        return Fault(
            packed, f"{show(packed)}: num_bits of the config's groups are {sorted(bits)}, and 2, 4 or 8 is read"
        )
    width = bits.pop()
    words, scales = infos[packed], infos[scale]
    if words.dtype is not DType.I32 or len(words.shape) != _MATRIX or infos[shape].shape != (_MATRIX,):
        return Fault(
            packed, f"{show(packed)} is {words.dtype.value} {list(words.shape)}, and words of 32 bits are read"
        )
    rows, per = words.shape[0], _WORD // width
    if len(scales.shape) != _MATRIX or scales.shape[0] not in (rows, 1) or scales.dtype not in _FLOATS:
        return misshapen(packed, scale, scales.shape, f"scales of {rows} rows")
    if infos[shape].dtype not in (DType.I64, DType.I32):
        return mistyped(packed, shape, infos[shape].dtype, "i64")
    columns = ((words.shape[1] - 1) * per + 1, words.shape[1] * per)
    if (counts := _group_counts(config, columns)) and not any(a <= scales.shape[1] <= b for a, b in counts):
        return misshapen(packed, scale, scales.shape, f"{' or '.join(str(b) for _, b in counts)} groups a row")
    asked = (-(-rows // per), scales.shape[1])
    if zero in infos and infos[zero].shape != asked:
        return misshapen(packed, zero, infos[zero].shape, asked)
    parts = {"packed": packed, "scale": scale, "shape": shape, **({"zero": zero} if zero in infos else {})}
    low, high = rows * columns[0], rows * columns[1]
    scheme = f"int{width} of compressed-tensors, packed"
    return Weight(weight, scheme, parts, None, (low, high), rows, {"bits": width})


def whole_compressed(weight: Weight, parts: Mapping[str, LazyTensor], dtype: DType, context: Context) -> LazyTensor:
    """`(code - zero) * scale`, rounded to the scale's dtype, then to the model's.

    Raises:
        Refused: the shape that is recorded is not one of these words and scales (`quantised-incomplete`).
    """
    raw = context.read(parts["shape"], max_bytes=16)
    format_of = {8: "<2i", 16: "<2q"}
    shape = struct.unpack(format_of[len(raw)], raw) if len(raw) in format_of else (0, 0)
    bits, words, scale = int(weight.params["bits"]), parts["packed"].info.shape, parts["scale"]
    groups = scale.info.shape[1]
    fits = shape[0] == words[0] == scale.info.shape[0] and -(-shape[1] * bits // _WORD) == words[1]
    if not fits or (groups > 1 and shape[1] % groups):
        what = f"{show(weight.name)}: its shape is recorded as {list(shape)}, and its words are {list(words)}"
        raise Refused("quantised-incomplete", what, expected=f"{groups} groups of each row")
    own = scale.info.dtype if scale.info.dtype in (DType.BF16, DType.F16) else dtype
    params: dict[str, Any] = {
        "bits": bits, "columns": shape[1], "group": shape[1] // groups, "first": 0, "out": own.value,
    }  # fmt: skip
    inputs = [parts["packed"], scale, *([parts["zero"]] if "zero" in parts else [])]
    return nodes.cast(nodes.apply(kernels.DEQUANTISE_PACKED_ROWS, inputs, params), dtype)


# GPTQ and AWQ


def find_gptq(infos: Infos, config: Mapping[str, Any]) -> Iterator[Found]:
    """Weights that have a `qweight` with words along the inputs."""
    yield from _packed_columns(infos, config, "gptq")


def find_awq(infos: Infos, config: Mapping[str, Any]) -> Iterator[Found]:
    """Weights that have a `qweight` with words along the outputs."""
    yield from _packed_columns(infos, config, "awq")


def _packed_columns(infos: Infos, config: Mapping[str, Any], layout: str) -> Iterator[Found]:
    ordered = [n for n in infos if n.endswith(".g_idx")] if layout == "gptq" else []
    for name in infos:
        module, _, part = name.rpartition(".")
        if part == "qweight" and (ordered or config.get("desc_act") is True) and layout == "gptq":
            # Without its own order a weight's inputs are in other groups than the others' are.
            order = f"{module}.g_idx"
            yield _columns(infos, module, config, layout) if order in infos else missing(name, order)
        elif part == "qweight":
            yield _columns(infos, module, config, layout)
        elif part in ("qzeros", "scales", "g_idx") and f"{module}.qweight" not in infos:
            yield orphan(name, f"{module}.qweight")


def _columns(infos: Infos, module: str, config: Mapping[str, Any], layout: str) -> Found:
    parts = {part: f"{module}.{part}" for part in ("qweight", "qzeros", "scales")}
    main = parts["qweight"]
    for part in parts.values():
        if part not in infos:
            return missing(main, part)
    words, zeros, scales = (infos[p] for p in parts.values())
    bits = config.get("bits", config.get("w_bit"))
    if bits not in ((4,) if layout == "awq" else (2, 4, 8)) or type(bits) is not int:
        return Fault(main, f"{show(main)}: {show(bits)} bits of {layout.upper()} are not read")
    if words.dtype is not DType.I32 or len(words.shape) != _MATRIX or len(scales.shape) != _MATRIX:
        return Fault(main, f"{show(main)} is {words.dtype.value} {list(words.shape)}, and words of 32 bits are read")
    per, (groups, rows) = _WORD // bits, scales.shape
    columns = words.shape[0] * (per if layout == "gptq" else 1)
    along = (words.shape[0], rows) if layout == "gptq" else (columns, rows // per)
    if words.shape != along or rows % per:
        return misshapen(main, main, words.shape, list_of(along))
    if scales.dtype not in _FLOATS or zeros.dtype is not DType.I32 or zeros.shape != (groups, rows // per):
        return misshapen(main, parts["qzeros"], zeros.shape, (groups, rows // per))
    asked = config.get("group_size", config.get("q_group_size"))
    size = columns if asked == -1 else asked
    if type(size) is not int or size <= 0 or -(-columns // size) != groups:
        return misshapen(main, parts["scales"], scales.shape, f"groups of {show(asked)} of {columns} inputs")
    order = f"{module}.g_idx"
    if layout == "gptq" and order in infos:
        if infos[order].shape != (columns,) or infos[order].dtype is not DType.I32:
            return misshapen(main, order, infos[order].shape, (columns,))
        parts["order"] = order
    kind = "GPTQ v2" if config.get("checkpoint_format") == "gptq_v2" else layout.upper()
    params = {"layout": layout, "bits": bits, "group": size, "groups": groups, "v2": kind != "GPTQ"}
    return Weight(f"{module}.weight", f"{kind}, {bits} bits", parts, (rows, columns), params=params)


def list_of(shape: tuple[int, ...]) -> str:
    """A shape in words."""
    return str(list(shape))


def whole_columns(weight: Weight, parts: Mapping[str, LazyTensor], dtype: DType, context: Context) -> LazyTensor:
    """`((code - zero) * scale)` of `[in, out]`, transposed; AWQ's first to the scale's dtype, as AutoAWQ multiplies.

    GPTQModel's product is of fp32, and rounded once to the model's dtype.

    Raises:
        Refused: a zero point of GPTQ's first format has overflowed into its neighbour, or a group is past the scales
            (`quantised-incomplete`).
    """
    params, scales = weight.params, parts["scales"]
    is_first = params["layout"] == "gptq" and not params["v2"]
    if is_first:
        _expect_no_overflow(weight, parts["qzeros"], context)
    inputs = [parts["qweight"], parts["qzeros"], scales]
    if "order" in parts:
        _expect_groups(weight, parts["order"], context)
        inputs.append(parts["order"])
    values = {
        "layout": params["layout"], "bits": params["bits"], "group": params["group"], "zero": int(is_first),
        "first": 0, "out": dtype.value,
    }  # fmt: skip
    if params["layout"] == "awq" and scales.info.dtype in (DType.BF16, DType.F16):
        values["out"] = scales.info.dtype.value
    return nodes.cast(nodes.apply(kernels.DEQUANTISE_PACKED_COLUMNS, inputs, values), dtype)


def _expect_no_overflow(weight: Weight, zeros: LazyTensor, context: Context) -> None:
    """GPTQ's first format stores a zero point less one; one of 0 is stored as all ones, and programs disagree on it."""
    raw, overflowed = context.read(zeros, max_bytes=_MOST_ZEROS), _overflowed(int(weight.params["bits"]))
    told = raw[:1] if raw == raw[:1] * len(raw) else raw  # of symmetric models all zero points are one number
    if 1 in told.translate(overflowed):
        what = (
            f"{show(weight.parts['qzeros'])} has a zero point of 0, stored less one: programs that read GPTQ's first "
            "format disagree on what it and its neighbour are"
        )
        raise Refused("quantised-unsupported", what, next="convert it to gptq_v2 with the program that made it")


@cache
def _overflowed(bits: int) -> bytes:
    """Of each byte, 1 where one of its fields is all ones, else 0."""
    ones = (1 << bits) - 1
    return bytes(any((byte >> at) & ones == ones for at in range(0, 8, bits)) for byte in range(256))


def _expect_groups(weight: Weight, order: LazyTensor, context: Context) -> None:
    raw, size = context.read(order, max_bytes=1 << 22), int(weight.params["group"])
    inputs = len(raw) // 4
    if size > 0 and inputs <= size * int(weight.params["groups"]) and raw == _in_order(inputs, size):
        return
    least, most, group, count = _groups(raw)
    if least < 0 or most >= int(weight.params["groups"]):
        what = f"{show(weight.parts['order'])} names group {most}, and there are {weight.params['groups']}"
        raise Refused("quantised-incomplete", what)
    if count > size:
        what = f"{show(weight.name)}: its g_idx puts {count} inputs into group {group}, and a group has {size}"
        raise Refused("quantised-incomplete", what)


@lru_cache(maxsize=4)
def _groups(raw: bytes) -> tuple[int, int, int, int]:
    """The first and the last group of a g_idx, and the largest with the number of its inputs.

    Weights that read the same inputs are quantised in the same order, one after the other.
    """
    groups = struct.unpack(f"<{len(raw) // 4}i", raw)
    counts = Counter(groups)
    return min(counts), max(counts), *counts.most_common(1)[0]


@lru_cache(maxsize=8)
def _in_order(inputs: int, size: int) -> bytes:
    """The g_idx of inputs that were not reordered."""
    return struct.pack(f"<{inputs}i", *(i // size for i in range(inputs)))


PACKED = Format(
    find_compressed,
    whole_compressed,
    "packed integers of 2, 4 and 8 bits, with and without zero points",
    "compressed-tensors 0.20.1",
)
GPTQ = Format(find_gptq, whole_columns, "2, 4 and 8 bits, both formats, act order", "GPTQModel 7.7.0")
AWQ = Format(find_awq, whole_columns, "4 bits, `gemm`", "AutoAWQ 0.2.9")
