"""Weights of eight bits with scales beside them: FP8 in blocks (DeepSeek, Qwen3) and compressed-tensors' FP8 and int8.

Sources:
https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/integrations/finegrained_fp8.py
https://github.com/vllm-project/compressed-tensors/blob/0.20.0/src/compressed_tensors/compressors/naive_quantized
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from converter.core.context import Context
from converter.core.tensors import nodes
from converter.core.tensors import quantised_specs as kernels
from converter.core.tensors.dtypes import DType
from converter.core.tensors.nodes import LazyTensor
from converter.families.quantised.weight import Fault, Format, Found, Infos, Shape, Weight, misshapen, missing, orphan
from converter.text import show

_FLOATS = (DType.F32, DType.BF16, DType.F16)
_SCALES = (*_FLOATS, DType.F8_E8M0)
_DEFAULT_BLOCK = (128, 128)
_MATRIX = 2

_INVERSE = "_scale_inv"
_SCALE = ".weight_scale"
_ZERO = ".weight_zero_point"
_ALONGSIDE = ("activation_scale", "input_scale", "input_zero_point", "output_scale")


def block_size(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns of a block, as `quantization_config` has them; None for one scale each weight."""
    found = config.get("weight_block_size", _DEFAULT_BLOCK)
    if isinstance(found, list | tuple) and len(found) == _MATRIX and all(type(n) is int and n > 0 for n in found):
        return int(found[0]), int(found[1])
    return None


def _grid(shape: Shape, block: tuple[int, int]) -> Shape:
    """How many blocks a matrix has, the last of each row and column perhaps a part of one."""
    return (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))


def _beside(infos: Infos, weight: str) -> dict[str, str]:
    """Scales of activations that stand in the weight's module: nothing that a whole weight has."""
    module = weight.rpartition(".")[0]
    return {part: name for part in _ALONGSIDE if (name := f"{module}.{part}") in infos}


def find_blocks(infos: Infos, config: Mapping[str, Any]) -> Iterator[Found]:
    """Weights of FP8 with a `weight_scale_inv`; it is a factor, whatever its name."""
    block = block_size(config)
    for name, info in infos.items():
        if name.endswith(_INVERSE):
            weight = name.removesuffix(_INVERSE)
            if weight not in infos or infos[weight].dtype is not DType.F8_E4M3:
                yield orphan(name, weight)
        elif info.dtype is DType.F8_E4M3 and f"{name.removesuffix('.weight')}{_SCALE}" not in infos:
            yield _in_blocks(infos, name, info.shape, block)
        elif info.dtype.is_float and info.dtype.bits == 8 and info.dtype not in (DType.F8_E4M3, DType.F8_E8M0):
            yield Fault(name, f"{show(name)} is {info.dtype.value}, which is not read")


def _in_blocks(infos: Infos, name: str, shape: Shape, block: tuple[int, int] | None) -> Found:
    scale = f"{name}{_INVERSE}"
    if scale not in infos:
        return missing(name, scale)
    held = infos[scale]
    if held.dtype not in _SCALES:
        return Fault(scale, f"{show(scale)} is {held.dtype.value}, and a float is expected")
    parts = {"weight": name, "scale": scale, **_beside(infos, name)}
    if held.numel == 1 and (block is None or len(held.shape) < _MATRIX):
        return Weight(name, "FP8, one scale each", parts, shape, params={"block": None})
    if block is None or len(shape) < _MATRIX or held.shape != _grid(shape, block):
        return misshapen(name, scale, held.shape, _grid(shape, block) if block and len(shape) >= _MATRIX else (1,))
    return Weight(name, f"FP8 in blocks of {block[0]} x {block[1]}", parts, shape, params={"block": block})


def whole(weight: Weight, parts: Mapping[str, LazyTensor], dtype: DType, context: Context) -> LazyTensor:
    """`W * scale`, each scale for its block, rounded once."""
    values, scale = parts["weight"], parts["scale"]
    rows, columns = weight.params["block"] or values.info.shape[-2:]
    inputs = [values, _as_grid(scale, values)]
    if "zero" in parts:
        inputs.append(_as_grid(parts["zero"], values))
    params: dict[str, Any] = {
        "rows": rows, "columns": columns, "first": 0, "zero": "zero" in parts,
        "out": dtype.value,
    }  # fmt: skip
    if weight.params.get("rounds") and scale.info.dtype in (DType.BF16, DType.F16):
        params["out"] = scale.info.dtype.value
    return nodes.cast(nodes.apply(kernels.DEQUANTISE_BLOCKS, inputs, params), dtype)


def _as_grid(scale: LazyTensor, values: LazyTensor) -> LazyTensor:
    """A scale with as many dimensions as its weight."""
    count = len(values.info.shape)
    return scale if len(scale.info.shape) == count else nodes.reshape(scale, (1,) * count)


def find_compressed(infos: Infos, config: Mapping[str, Any]) -> Iterator[Found]:
    """Weights of FP8 or int8 with a `weight_scale`, as compressed-tensors has them."""
    for name, info in infos.items():
        module = name.removesuffix(".weight")
        if name.endswith(_SCALE):
            weight = f"{name.removesuffix(_SCALE)}.weight"
            is_packed = f"{name.removesuffix(_SCALE)}.weight_packed" in infos
            if not is_packed and (weight not in infos or infos[weight].dtype not in (DType.F8_E4M3, DType.I8)):
                yield orphan(name, weight)
        elif name.endswith(".weight") and info.dtype in (DType.F8_E4M3, DType.I8):
            yield _compressed(infos, name, module, _strategies(config))


def _strategies(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What the groups of a config say of weights: `strategy`, `group_size`, `block_structure`."""
    groups = config.get("config_groups")
    held = [g.get("weights") for g in groups.values() if isinstance(g, Mapping)] if isinstance(groups, Mapping) else []
    return [each for each in held if isinstance(each, Mapping)]


def _block_of(shape: Shape, weights: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns that one scale is for, in a matrix of that shape."""
    strategy, size = weights.get("strategy"), weights.get("group_size")
    if strategy == "tensor":
        return shape[0], shape[1]
    if strategy == "block":
        return block_size({"weight_block_size": weights.get("block_structure")})
    if strategy == "group":
        return (1, size) if type(size) is int and size > 0 else None
    return 1, shape[1]


def _compressed(infos: Infos, name: str, module: str, strategies: Sequence[Mapping[str, Any]]) -> Found:
    scale, zero, shape = f"{module}{_SCALE}", f"{module}{_ZERO}", infos[name].shape
    if scale not in infos:
        return missing(name, scale)
    held = infos[scale]
    if held.dtype not in _FLOATS or len(shape) != _MATRIX:
        return Fault(scale, f"{show(scale)} is {held.dtype.value} {list(held.shape)} of a weight {list(shape)}")
    blocks = [b for b in (_block_of(shape, w) for w in strategies) if b is not None]
    fitting = [
        b for b in blocks if held.numel == math.prod(_grid(shape, b)) and held.shape[:1] in ((1,), _grid(shape, b)[:1])
    ]
    if not fitting:
        grids = " or ".join(str(list(_grid(shape, b))) for b in blocks) or "what a group of the config says"
        return misshapen(name, scale, held.shape, grids)
    if zero in infos and infos[zero].shape != held.shape:
        return misshapen(name, zero, infos[zero].shape, held.shape)
    block = fitting[0]
    how = (
        "one scale each"
        if block == shape
        else "a scale each row"
        if block == (1, shape[1])
        else f"in blocks of {block[0]} x {block[1]}"
    )
    kind = "FP8" if infos[name].dtype is DType.F8_E4M3 else "int8"
    parts = {"weight": name, "scale": scale, **({"zero": zero} if zero in infos else {}), **_beside(infos, name)}
    params = {"block": block, "grid": _grid(shape, block), "rounds": True}
    return Weight(name, f"{kind} of compressed-tensors, {how}", parts, shape, params=params)


def whole_compressed(weight: Weight, parts: Mapping[str, LazyTensor], dtype: DType, context: Context) -> LazyTensor:
    """`(W - zero) * scale`, rounded to the scale's dtype, then to the model's."""
    grid = weight.params["grid"]
    grids = {k: nodes.reshape(t, grid) if k in ("scale", "zero") else t for k, t in parts.items()}
    return whole(weight, grids, dtype, context)


BLOCKS = Format(
    find_blocks,
    whole,
    "FP8 in blocks (DeepSeek-V3, Qwen3-FP8), or with one scale each",
    "transformers 5.23 where the shape is whole blocks; ragged blocks by definition, since it refuses or misreads them",
)
COMPRESSED = Format(
    find_compressed, whole_compressed, "FP8 and int8 by tensor, row or block", "compressed-tensors 0.20.1"
)
