"""Kernels of methods, declared in one line each: which of their inputs follow the rows of the weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from converter.core.tensors.dtypes import DType, TensorInfo
from converter.core.tensors.kernel_specs import Infos, KernelSpec, Params, Slice, accumulates_wide

Needs = tuple[Slice | None, ...] | None
Rows = tuple[int | None, ...]


def of_weight(
    name: str,
    body: str,
    rows: Rows | Callable[[Infos, Params], Rows] | None = None,
    *,
    copies: int = 4,
    more: Callable[[Infos], int] = lambda inputs: 0,
) -> KernelSpec:
    """A kernel whose result has the weight's shape.

    Args:
        body: in the methods' folder: `lokr:merged`.
        rows: for each input after the weight the dimension that goes along the weight's rows, None for one that is
            needed whole. None for all: only the whole weight can be computed. A weight stored `[in, out]` and
            that of a convolution are always computed whole.
        copies: how many tensors of the weight's size the body holds at a time.
        more: elements that it holds beside them.
    """

    def needs(start: int, stop: int, inputs: Infos, params: Params) -> Needs:
        if rows is None or params.get("transposed") or len(inputs[0].shape) > 2:
            return None
        length = stop - start
        dims = rows(inputs, params) if callable(rows) else rows
        along = [None if dim is None else Slice(dim, start, length) for dim in dims]
        return (Slice(0, start, length), *along)

    def workspace(inputs: Infos, params: Params) -> int:
        width = 8 if accumulates_wide(inputs[0].dtype.torch_name, params) else 4
        factors = sum(i.numel for i in inputs[1:])
        return width * (copies * inputs[0].numel + 2 * factors + more(inputs))

    def info(inputs: Infos, params: Params) -> TensorInfo:
        return TensorInfo(DType(params["out"]), inputs[0].shape)

    where = f"converter.converters.merge.methods.{body}"
    return KernelSpec(name, where, info, needs, workspace, rounds=True)


def decomposed(copies: int) -> Callable[[Infos], int]:
    """Elements that a singular value decomposition of the weight holds, and copies of the directions that it finds."""

    def elements(inputs: Infos) -> int:
        rows, columns = inputs[0].shape
        small = min(rows, columns)
        return copies * small * (rows + columns) + 8 * small * small

    return elements


Given = Mapping[str, Any]
"""Parameters, as a kernel's body is given them."""

Tensors = list[Any]
"""What a kernel's body is given: tensors of torch, which this folder does not import before they are computed."""
