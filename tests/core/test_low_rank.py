"""Factors of low rank against torch's whole decomposition in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from converter.core.compute import low_rank

ROWS, COLUMNS = 640, 700
"""Neither is small enough to be decomposed whole."""


def drawn(seed: int, decay: float) -> Any:
    """A matrix whose singular values fall as training's do: a few large ones, then a long tail."""
    noise = torch.Generator().manual_seed(seed)
    left, _ = torch.linalg.qr(torch.randn(ROWS, ROWS, generator=noise, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(COLUMNS, ROWS, generator=noise, dtype=torch.float64))
    values = torch.arange(1, ROWS + 1, dtype=torch.float64).pow(-decay)
    return (left * values @ right.T).float()


def factors(tuned: Any, base: Any, rank: int, *, transposed: bool = False) -> tuple[Any, Any, dict[str, float]]:
    params = {"rank": rank, "transposed": transposed, "out": "F32"}
    a = low_rank.difference_factor([tuned, base], params | {"part": "A"})
    found = low_rank.difference_factor([tuned, base], params | {"part": "B"})
    assert isinstance(found, tuple)
    return a, found[0], found[1]


@pytest.mark.parametrize("decay", [0.3, 1.0])
def test_a_sketch_leaves_out_hardly_more_than_the_best_pair_of_its_rank(decay: float) -> None:
    change, rank = drawn(0, decay), 24
    a, b, said = factors(change, torch.zeros_like(change), rank)
    squares = torch.linalg.svdvals(change.double()).square()
    left = float((change.double() - b.double() @ a.double()).square().sum())
    assert float(squares[rank:].sum()) <= left * (1 + 1e-6)
    assert left <= 1.001 * float(squares[rank:].sum())
    assert said["difference_left"] == pytest.approx(left, rel=1e-4)
    assert said["difference"] == pytest.approx(float(squares.sum()), rel=1e-6)


def test_a_matrix_of_that_rank_comes_back_whole_and_with_the_same_bits_each_time() -> None:
    noise = torch.Generator().manual_seed(1)
    change = torch.randn(ROWS, 8, generator=noise) @ torch.randn(8, COLUMNS, generator=noise)
    base = torch.randn(ROWS, COLUMNS, generator=noise)
    a, b, _ = factors(base + change, base, 8)
    assert float((b @ a - change).norm() / change.norm()) < 1e-6
    again = factors(base + change, base, 8)
    assert torch.equal(a, again[0])
    assert torch.equal(b, again[1])


def test_a_weight_that_is_stored_in_by_out_gives_factors_of_the_layer() -> None:
    change = drawn(2, 2.0)
    a, b, _ = factors(change.T.contiguous(), torch.zeros(COLUMNS, ROWS), 5, transposed=True)
    assert (a.shape, b.shape) == ((5, COLUMNS), (ROWS, 5))
    assert float((b @ a - change).norm() / change.norm()) < 0.1


@pytest.mark.parametrize(("decay", "energy"), [(1.0, 0.9), (0.1, 0.9)])
def test_the_least_rank_of_an_energy_is_that_of_the_singular_values(decay: float, energy: float) -> None:
    change = drawn(3, decay)
    squares = torch.linalg.svdvals(change.double()).square()
    wanted = int((squares.cumsum(0) / squares.sum() < energy * (1 - 1e-9)).sum()) + 1
    found = low_rank.enough_rank([change, torch.zeros_like(change)], {"energy": energy, "transposed": False})
    assert int(found) == wanted
    zero = low_rank.enough_rank([change, change], {"energy": energy, "transposed": False})
    assert int(zero) == 0


def test_a_product_at_a_lower_rank_is_the_best_of_that_rank() -> None:
    noise = torch.Generator().manual_seed(4)
    b, a = torch.randn(90, 12, generator=noise), torch.randn(12, 70, generator=noise)
    params = {"rank": 5, "scale": 1.0, "out": "F32"}
    first = low_rank.product_factor([b, a], params | {"part": "A"})
    second = low_rank.product_factor([b, a], params | {"part": "B"})
    assert isinstance(second, tuple)
    u, values, v = torch.linalg.svd(b.double() @ a.double())
    best = u[:, :5] * values[:5] @ v[:5]
    assert float((second[0] @ first - best).norm() / best.norm()) < 1e-6
    assert second[1]["difference_left"] == pytest.approx(float(values[5:].square().sum()), rel=1e-6)
    assert second[1]["difference"] == pytest.approx(float(values.square().sum()), rel=1e-6)
    twice = low_rank.product_factor([b, a], params | {"part": "B", "scale": 2.0})
    assert twice[1]["difference"] == pytest.approx(4 * second[1]["difference"])
