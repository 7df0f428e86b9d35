"""What the kernels of PEFT methods share: the dtype of the sums, PEFT's roundings, and the measures of an update.

A method's kernel says what its update of a weight is, in whatever dtype it is handed; here that is computed in the
accumulation dtype and rounded once (`best`), or as PEFT rounds it (`peft`). PEFT keeps an adapter in fp32 over a base
of 16 bits, and adds in one of three ways: in fp32 with one rounding, the update rounded first, or in the base's dtype.

Source: `merge` of https://github.com/huggingface/peft/tree/v0.21.2/src/peft/tuners
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from converter.core.compute.kernels import measured
from converter.core.compute.measures import Measures
from converter.core.tensors.dtypes import DType
from converter.core.tensors.kernel_specs import accumulates_wide

Params = Mapping[str, Any]
Rounding = Literal["once", "update-first", "own-dtype"]

Make = Callable[[Tensor, list[Tensor], Params], Tensor]
"""An update, or a new weight, of the weight and the factors."""


def added(inputs: list[Tensor], params: Params, update: Make, rounding: Rounding = "once") -> tuple[Tensor, Measures]:
    """`W + update`, the update weighted by the parameter `weight`.

    Args:
        rounding: what PEFT's own addition does; `own-dtype` hands the update a weight in the base's dtype.
    """
    out: torch.dtype = getattr(torch, DType(params["out"]).torch_name)
    if params["numerics"] == "best":
        wide = torch.float64 if accumulates_wide(str(inputs[0].dtype), params) else torch.float32
        base = inputs[0].to(wide)
        change = update(base, widened(inputs[1:], wide), params) * float(params.get("weight", 1.0))
        exact = base + change
        return _with_measures(exact.to(out), base, change, inputs)
    weight = inputs[0].to(out)
    wide = torch.promote_types(out, torch.float32)
    own = weight if rounding == "own-dtype" else weight.to(wide)
    change = update(own, widened(inputs[1:], wide), params)
    merged = (weight + change.to(out)) if rounding != "once" else (weight.to(wide) + change).to(out)
    return _with_measures(merged, weight.to(wide), change.to(wide), inputs)


def replaced(inputs: list[Tensor], params: Params, new: Make, *, own_dtype: bool = False) -> tuple[Tensor, Measures]:
    """The weight that `new` makes of the old one.

    Args:
        own_dtype: PEFT computes it in the base's dtype, not in fp32.
    """
    out: torch.dtype = getattr(torch, DType(params["out"]).torch_name)
    is_best = params["numerics"] == "best"
    if is_best:
        wide = torch.float64 if accumulates_wide(str(inputs[0].dtype), params) else torch.float32
    else:
        wide = torch.promote_types(out, torch.float32)
    base = inputs[0].to(wide if is_best else out).to(wide)
    given = inputs[0].to(out) if own_dtype and not is_best else base
    exact = new(given, widened(inputs[1:], wide), params)
    return _with_measures(exact.to(out), base, exact.to(wide) - base, inputs)


def widened(factors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Factors in a wider dtype; positions and other whole numbers stay as they are."""
    return [f.to(dtype) if f.is_floating_point() else f for f in factors]


def _with_measures(merged: Tensor, base: Tensor, update: Tensor, inputs: list[Tensor]) -> tuple[Tensor, Measures]:
    floating = [i for i in inputs if i.is_floating_point()]
    return merged, measured(base, update.contiguous(), merged.contiguous(), floating)
