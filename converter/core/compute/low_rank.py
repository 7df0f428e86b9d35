"""Matrices of low rank that stand for a difference: the kernels behind `extract-lora` and `prune-lora`.

A small matrix is decomposed whole, in fp64. Of a large one a random sketch is taken, sharpened by four power
iterations, which finds the leading singular vectors of what training leaves; the sketch is drawn from a fixed seed, so
that the same matrix gives the same factors. Whichever it was, the error is measured and not estimated.

Source: Halko, Martinsson, Tropp, "Finding structure with randomness", https://arxiv.org/abs/0909.4061, algorithm 4.4.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from converter.core.compute.measures import Measures
from converter.core.tensors.dtypes import DType

WHOLE = 512
"""Matrices with no more rows, or no more columns, are decomposed whole."""

_OVERSAMPLED = 16
_ITERATIONS = 4
_SEED = 20261130


def difference_factor(inputs: list[Tensor], params: Mapping[str, Any]) -> tuple[Tensor, Measures] | Tensor:
    """One factor of `tuned - base`; see `converter.core.tensors.low_rank_specs.DIFFERENCE_FACTOR`."""
    return _part(_difference(inputs, params), params)


def product_factor(inputs: list[Tensor], params: Mapping[str, Any]) -> tuple[Tensor, Measures] | Tensor:
    """One factor of what `B @ A` is at a lower rank; see `low_rank_specs.PRODUCT_FACTOR`."""
    second, first = inputs[0].double(), inputs[1].double()
    q_b, r_b = torch.linalg.qr(second.reshape(second.shape[0], -1))
    q_a, r_a = torch.linalg.qr(first.reshape(first.shape[0], -1).T)
    u, values, v = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    rank = int(params["rank"])
    total = float(values.square().sum())
    kept = _Factors(q_b @ u[:, :rank], values[:rank], v[:rank] @ q_a.T)
    given = _given(kept, params, total, lambda b, a: total - kept.energy + _rounding(kept, b, a))
    if isinstance(given, Tensor):
        return given.reshape(rank, *first.shape[1:])
    weight = float(params["scale"]) ** 2
    said = {key: weight * value for key, value in given[1].items()}
    return given[0].reshape(second.shape[0], rank, *second.shape[2:]), said


def factor(inputs: list[Tensor], params: Mapping[str, Any]) -> Tensor:
    """A factor in another layout, rounded once; see `low_rank_specs.FACTOR`."""
    out: torch.dtype = getattr(torch, DType(params["out"]).torch_name)
    found = inputs[0].T if params["transposed"] else inputs[0]
    scale = float(params["scale"])
    return found.to(out) if scale == 1 else (found.double() * scale).to(out)


def enough_rank(inputs: list[Tensor], params: Mapping[str, Any]) -> Tensor:
    """The least rank that keeps a share of the difference's energy; see `low_rank_specs.ENOUGH_RANK`."""
    found = _difference(inputs, params)
    total = _squares(found)
    if total == 0:
        return torch.zeros(1, dtype=torch.int64)
    share, small = float(params["energy"]), min(found.shape)
    if small > WHOLE:
        for width in (64, 256, 1024):
            if 4 * width > small:
                break
            values = _decomposed(found, width).values
            if float(values.square().sum()) >= share * total:
                return _least(values, share * total)
    rows = found if found.shape[0] <= found.shape[1] else found.T
    gram = torch.zeros(small, small, dtype=torch.float64)
    for at in range(0, rows.shape[1], 4096):
        wide = rows[:, at : at + 4096].double()
        gram += wide @ wide.T
    squares = torch.linalg.eigvalsh(gram).flip(0).clamp_min(0)
    return _least(squares.sqrt(), share * total)


def _least(values: Tensor, wanted: float) -> Tensor:
    enough = values.double().square().cumsum(0) >= wanted * (1 - 1e-12)
    rank = int(torch.argmax(enough.int())) + 1 if bool(enough.any()) else values.numel()
    return torch.tensor([rank], dtype=torch.int64)


class _Factors:
    """`U @ diag(values) @ V`, the leading part of a matrix."""

    def __init__(self, u: Tensor, values: Tensor, v: Tensor) -> None:
        self.u, self.values, self.v = u, values, v

    @property
    def energy(self) -> float:
        return float(self.values.double().square().sum())

    def pair(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """B and A, which share the singular values evenly."""
        root = self.values.sqrt()
        return (self.u * root).to(dtype), (root[:, None] * self.v).to(dtype)


def _difference(inputs: list[Tensor], params: Mapping[str, Any]) -> Tensor:
    """`tuned - base`, `[out, in]`, in fp32: exact for 16 bits, and for fp32 where the two are near each other."""
    found = inputs[0].to(torch.float32) - inputs[1].to(torch.float32)
    return found.T.contiguous() if params["transposed"] else found


def _part(found: Tensor, params: Mapping[str, Any]) -> tuple[Tensor, Measures] | Tensor:
    kept = _decomposed(found, int(params["rank"]))
    return _given(kept, params, _squares(found), lambda b, a: _error(found, b, a))


def _squares(found: Tensor) -> float:
    squares = [float(piece.double().square().sum()) for piece in _pieces(found)]
    return sum(squares)


def _error(found: Tensor, b: Tensor, a: Tensor) -> float:
    """||D - B A||^2 of the factors as they are written."""
    a = a.to(torch.float32)
    pieces = zip(_pieces(found), _pieces(b.to(torch.float32)), strict=True)
    squares = [float((piece - rows @ a).double().square().sum()) for piece, rows in pieces]
    return sum(squares)


def _pieces(matrix: Tensor) -> Iterator[Tensor]:
    """The rows, some at a time: what is computed of all of them in fp64 need not be in memory at once."""
    for at in range(0, matrix.shape[0], 256):
        yield matrix[at : at + 256]


def _rounding(kept: _Factors, b: Tensor, a: Tensor) -> float:
    exact_b, exact_a = kept.pair(torch.float64)
    return float((exact_b @ exact_a - b.double() @ a.double()).square().sum())


def _given(kept: _Factors, params: Mapping[str, Any], total: float, error: Any) -> tuple[Tensor, Measures] | Tensor:
    """A, or B with what the pair leaves out: both are of one decomposition."""
    out: torch.dtype = getattr(torch, DType(params["out"]).torch_name)
    b, a = kept.pair(out)
    if params["part"] == "A":
        return a
    return b, {"difference": total, "difference_left": max(error(b, a), 0.0)}


def _decomposed(found: Tensor, rank: int) -> _Factors:
    """The leading `rank` singular values and vectors."""
    small = min(found.shape)
    if small <= WHOLE or 2 * rank > small:
        wide = found.double() if found.numel() <= 1 << 23 else found
        u, values, v = torch.linalg.svd(wide, full_matrices=False)
        return _Factors(u[:, :rank], values[:rank], v[:rank])
    width = min(rank + _OVERSAMPLED, small)
    generator = torch.Generator().manual_seed(_SEED)
    sketch = found @ torch.randn(found.shape[1], width, generator=generator)
    basis = torch.linalg.qr(sketch).Q
    for _ in range(_ITERATIONS):
        other = torch.linalg.qr(found.T @ basis).Q
        basis = torch.linalg.qr(found @ other).Q
    u, values, v = torch.linalg.svd((basis.T @ found).double(), full_matrices=False)
    return _Factors(basis.double() @ u[:, :rank], values[:rank], v[:rank])
