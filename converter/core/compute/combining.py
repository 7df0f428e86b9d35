"""Several LoRA adapters made into one: the kernel behind `--combine`, with the semantics of PEFT's
`add_weighted_adapter`.

`cat` lays factors side by side, which is the exact weighted sum. `linear`, `ties`, `magnitude_prune`, `dare_linear` and
`dare_ties` work on the A factors and on the B factors apart, each weighted by the root of its weight: what comes out is
not the sum of the updates. `svd` is the best approximation of the exact sum at a rank.

Source: https://github.com/huggingface/peft/blob/v0.21.2/src/peft/tuners/lora/model.py (`add_weighted_adapter`) and
https://github.com/huggingface/peft/blob/v0.21.2/src/peft/utils/merge_utils.py
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from converter.core.tensors.dtypes import DType


def lora_combine(inputs: list[Tensor], params: Mapping[str, Any]) -> Tensor:
    """One factor of the combined adapter: see `converter.converters.merge.combining.LORA_COMBINE`."""
    out: torch.dtype = getattr(torch, DType(params["out"]).torch_name)
    return _combined(inputs, params, torch.promote_types(out, torch.float32)).to(out)


def _combined(inputs: list[Tensor], params: Mapping[str, Any], dtype: torch.dtype) -> Tensor:
    tensors = [t.to(dtype) for t in inputs]
    first, second = tensors[0::2], tensors[1::2]
    weights, scales = params["weights"], params["scales"]
    is_a = params["part"] == "A"
    if params["how"] == "cat":
        parts = [a * w * s for a, w, s in zip(first, weights, scales, strict=True)]
        return torch.cat(parts, dim=0) if is_a else torch.cat(second, dim=1)
    if params["how"] == "svd":
        return _approximated(first, second, params, is_a=is_a)
    sides = _sparse(first, second, params)
    weighed = [w * s for w, s in zip(weights, scales, strict=True)]
    roots = [math.sqrt(abs(w)) * (-1 if w < 0 and is_a else 1) for w in weighed]
    return _together(sides[0 if is_a else 1], _along(roots, dtype), params)


def _along(weights: list[float], dtype: torch.dtype) -> Tensor:
    """Weights as PEFT has them, which is in fp32; over wider sums they are as exact as they can be."""
    return torch.tensor(weights, dtype=dtype)


def _sparse(first: list[Tensor], second: list[Tensor], params: Mapping[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """Both sides with elements dropped: the smallest, or drawn ones with the rest made larger."""
    how, density = params["how"], float(params["density"])
    if how == "linear" or density >= 1:
        return first, second
    if how.startswith("dare"):
        generator = torch.Generator().manual_seed(int(params["seed"]))
        drawn = [
            [t * torch.bernoulli(torch.full(t.shape, density), generator=generator).to(t.dtype) / density for t in side]
            for side in (first, second)
        ]
        return drawn[0], drawn[1]
    return [_largest(t, density) for t in first], [_largest(t, density) for t in second]


def _largest(tensor: Tensor, density: float) -> Tensor:
    mask = torch.zeros_like(tensor).reshape(-1)
    mask[torch.topk(tensor.abs().reshape(-1), k=int(density * tensor.numel())).indices] = 1
    return tensor * mask.reshape(tensor.shape)


def _together(side: list[Tensor], weights: Tensor, params: Mapping[str, Any]) -> Tensor:
    """The weighted sum; with `ties` only of elements whose sign most of them have, divided by how many those are."""
    stack = torch.stack(side)
    weighed = stack * weights.view(-1, *[1] * (stack.dim() - 1))
    if not params["how"].endswith("ties"):
        return weighed.sum(dim=0)
    counted = stack.sign() if params["majority"] == "frequency" else stack
    agreed = stack.sign() == torch.where(counted.sum(dim=0) >= 0, 1, -1)
    return (weighed * agreed).sum(dim=0) / torch.clamp(agreed.sum(dim=0), min=1.0)


def _approximated(first: list[Tensor], second: list[Tensor], params: Mapping[str, Any], *, is_a: bool) -> Tensor:
    deltas = [(b @ a) * s for a, b, s in zip(first, second, params["scales"], strict=True)]
    stack = torch.stack(deltas)
    whole = (stack * _along(list(params["weights"]), stack.dtype).view(-1, 1, 1)).sum(dim=0)
    rank = min(int(params["rank"]), *whole.shape)
    u, s, vh = torch.linalg.svd(whole, full_matrices=True)
    made: Tensor = vh[:rank].contiguous() if is_a else u[:, :rank] @ torch.diag(s[:rank])
    return made
