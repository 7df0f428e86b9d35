"""MXFP4 as gpt-oss stores its experts: `X_blocks` and `X_scales` on disk are the parameter `X`.

Source: https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/integrations/mxfp4.py
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

_BLOCKS, _SCALES = "_blocks", "_scales"
_DIMENSIONS = 4
_BYTES = 16
"""Bytes of a block: 32 codes under one scale."""


def find(infos: Infos, config: Mapping[str, Any]) -> Iterator[Found]:
    """Stacks of experts in blocks of 32 codes of four bits, each with a scale that is a power of two."""
    for name, info in infos.items():
        if name.endswith(_BLOCKS) and info.dtype is DType.U8:
            yield _stack(infos, name, name.removesuffix(_BLOCKS))
        elif (
            name.endswith(_SCALES) and info.dtype is DType.U8 and f"{name.removesuffix(_SCALES)}{_BLOCKS}" not in infos
        ):
            yield orphan(name, f"{name.removesuffix(_SCALES)}{_BLOCKS}")


def _stack(infos: Infos, blocks: str, name: str) -> Found:
    scales, shape = f"{name}{_SCALES}", infos[blocks].shape
    if scales not in infos:
        return missing(blocks, scales)
    if len(shape) != _DIMENSIONS or shape[-1] != _BYTES:
        return Fault(blocks, f"{show(blocks)} is {list(shape)}, and [experts, rows, blocks, {_BYTES}] is expected")
    if infos[scales].dtype is not DType.U8 or infos[scales].shape != shape[:-1]:
        return misshapen(blocks, scales, infos[scales].shape, shape[:-1])
    experts, rows, count, width = shape
    return Weight(name, "MXFP4", {"blocks": blocks, "scales": scales}, (experts, count * 2 * width, rows))


def whole(weight: Weight, parts: Mapping[str, LazyTensor], dtype: DType, context: Context) -> LazyTensor:
    """`e2m1[code] * 2^(scale - 127)`, in the order of an unquantised folder."""
    return nodes.apply(kernels.DEQUANTISE_MXFP4, [parts["blocks"], parts["scales"]], {"out": dtype.value})


MXFP4 = Format(find, whole, "MXFP4 (gpt-oss' experts)", "transformers 5.23, all bytes")
