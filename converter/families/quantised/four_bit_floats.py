"""Floats of four bits (e2m1) in groups of a row, as compressed-tensors packs them: NVFP4 and MXFP4 of any matrix.

`weight_packed` `[out, in / 2]` holds two codes a byte, the low half first. NVFP4 has a scale in FP8 for each 16 of a
row and one for the whole tensor, by which the others are divided; MXFP4 has a power of two for each 32.

Source: https://github.com/vllm-project/compressed-tensors/blob/0.20.1/src/compressed_tensors/compressors/nvfp4/base.py
and `mxfp4/base.py` beside it
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from converter.core.context import Context
from converter.core.tensors import nodes
from converter.core.tensors import quantised_specs as kernels
from converter.core.tensors.dtypes import DType
from converter.core.tensors.nodes import LazyTensor
from converter.families.quantised.weight import Fault, Format, Found, Infos, Weight, misshapen, missing, orphan
from converter.text import show

_PACKED, _GLOBAL = ".weight_packed", ".weight_global_scale"
_GROUPS = {DType.F8_E4M3: 16, DType.U8: 32}
"""Codes under one scale, by the scale's type."""

_MATRIX = 2


def find(infos: Infos, config: Mapping[str, Any]) -> Iterator[Found]:
    """Weights that have a `weight_packed` of bytes."""
    for name, info in infos.items():
        if name.endswith(_PACKED) and info.dtype is DType.U8:
            yield _weight(infos, name)
        elif name.endswith(_GLOBAL) and f"{name.removesuffix(_GLOBAL)}{_PACKED}" not in infos:
            yield orphan(name, f"{name.removesuffix(_GLOBAL)}{_PACKED}")


def _weight(infos: Infos, packed: str) -> Found:
    module = packed.removesuffix(_PACKED)
    scale, whole, zero = f"{module}.weight_scale", f"{module}{_GLOBAL}", f"{module}.weight_zero_point"
    if scale not in infos:
        return missing(packed, scale)
    codes, scales = infos[packed], infos[scale]
    group = _GROUPS.get(scales.dtype)
    if group is None or len(codes.shape) != _MATRIX or zero in infos:
        got = f"{show(zero)} is there" if zero in infos else f"{show(scale)} is {scales.dtype.value}"
        return Fault(packed, f"{show(packed)}: floats of four bits with scales in FP8 or powers of two are read; {got}")
    rows, columns = codes.shape[0], 2 * codes.shape[1]
    if columns % group or scales.shape != (rows, columns // group):
        return misshapen(packed, scale, scales.shape, f"[{rows}, {columns} / {group}]")
    is_nvidia = group == _GROUPS[DType.F8_E4M3]
    parts = {"packed": packed, "scale": scale}
    if is_nvidia:
        if whole not in infos:
            return missing(packed, whole)
        if infos[whole].dtype is not DType.F32 or infos[whole].shape != (1,):
            return misshapen(packed, whole, infos[whole].shape, "one number of fp32 in one dimension")
        parts["global"] = whole
    elif whole in infos:
        return Fault(whole, f"{show(whole)} of {show(packed)} goes with scales in FP8, and these are powers of two")
    beside = f"{module}.input_global_scale"
    parts |= {"beside": beside} if beside in infos else {}
    scheme = f"{'NVFP4' if is_nvidia else 'MXFP4'} of compressed-tensors"
    return Weight(f"{module}.weight", scheme, parts, (rows, columns), params={"group": group})


def whole(weight: Weight, parts: Mapping[str, LazyTensor], dtype: DType, context: Context) -> LazyTensor:
    """`e2m1[code] * (scale / global)`, rounded to bf16 as compressed-tensors has it, then to the model's dtype."""
    inputs = [parts[p] for p in ("packed", "scale", "global") if p in parts]
    params: dict[str, Any] = {"group": weight.params["group"], "out": DType.BF16.value}
    return nodes.cast(nodes.apply(kernels.DEQUANTISE_FOUR_BIT_FLOATS, inputs, params), dtype)


FOUR_BIT_FLOATS = Format(find, whole, "NVFP4 and MXFP4 of a matrix", "compressed-tensors 0.20.1")
