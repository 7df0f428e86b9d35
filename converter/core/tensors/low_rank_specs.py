"""Declarations of the kernels that make a matrix of low rank of a difference or of a product, without torch."""

from __future__ import annotations

from converter.core.tensors.dtypes import DType, TensorInfo
from converter.core.tensors.kernel_specs import Infos, KernelSpec, Params

_BODIES = "converter.core.compute.low_rank"


def _rank(params: Params) -> int:
    value = params["rank"]
    assert isinstance(value, int)
    return value


def _matrix(inputs: Infos, params: Params) -> tuple[int, int]:
    rows, columns = inputs[0].shape
    return (columns, rows) if params["transposed"] else (rows, columns)


def _difference_info(inputs: Infos, params: Params) -> TensorInfo:
    rows, columns = _matrix(inputs, params)
    shape = (_rank(params), columns) if params["part"] == "A" else (rows, _rank(params))
    return TensorInfo(DType(params["out"]), shape)


def _difference_workspace(inputs: Infos, params: Params) -> int:
    """The difference and both models in fp32; a sketch, or a whole decomposition in fp64."""
    rows, columns = inputs[0].shape
    small = min(rows, columns)
    if small <= 512:
        return 16 * rows * columns + 8 * (3 * rows * columns + 8 * small * small)
    rank = params.get("rank", 1024)
    assert isinstance(rank, int)
    if 2 * rank > small:
        return 24 * rows * columns + 64 * small * small
    return 16 * rows * columns + 48 * (rank + 16) * (rows + columns)


DIFFERENCE_FACTOR = KernelSpec(
    "difference-factor",
    f"{_BODIES}:difference_factor",
    _difference_info,
    lambda start, stop, inputs, params: None,
    _difference_workspace,
    rounds=True,
)
"""A or B of the best `B @ A` for `tuned - base` at a rank, the singular values shared evenly. Inputs: both weights,
`[out, in]` (`[in, out]` with `transposed`). Params: `part` (`A`: `[rank, in]`; `B`: `[out, rank]`, which measures what
the pair leaves out), `rank`, `transposed`, `out`."""

ENOUGH_RANK = KernelSpec(
    "enough-rank",
    f"{_BODIES}:enough_rank",
    lambda inputs, params: TensorInfo(DType.I64, (1,)),
    lambda start, stop, inputs, params: None,
    lambda inputs, params: _difference_workspace(inputs, {**params, "rank": min(inputs[0].shape)}),
)
"""The least rank at which `B @ A` keeps the share `energy` of ||tuned - base||^2; 0 where they are equal. Inputs and
`transposed` as above."""


def _product_info(inputs: Infos, params: Params) -> TensorInfo:
    rank = _rank(params)
    second, first = inputs[0].shape, inputs[1].shape
    shape = (rank, *first[1:]) if params["part"] == "A" else (second[0], rank, *second[2:])
    return TensorInfo(DType(params["out"]), shape)


PRODUCT_FACTOR = KernelSpec(
    "product-factor",
    f"{_BODIES}:product_factor",
    _product_info,
    lambda start, stop, inputs, params: None,
    lambda inputs, params: 40 * (inputs[0].numel + inputs[1].numel),
    rounds=True,
)
"""A or B of the best approximation of `B @ A` at a lower rank, without the product ever being made. Inputs: B
`[out, r]`, A `[r, in]`. Params: `part`, `rank`, `scale` (of the update, for what is measured), `out`."""


FACTOR = KernelSpec(
    "factor",
    f"{_BODIES}:factor",
    lambda inputs, params: TensorInfo(
        DType(params["out"]), inputs[0].shape[::-1] if params["transposed"] else inputs[0].shape
    ),
    lambda start, stop, inputs, params: None,
    lambda inputs, params: 8 * inputs[0].numel,
    rounds=True,
)
"""A factor times a number, its two dimensions exchanged or not. Params: `scale`, `transposed`, `out`."""
