"""What kernels measure of a tensor they compute, and what that says: how large an update is, how much of it survives.

`base` is ||W||^2, `update` ||D||^2 with D the exact update, `effective` <W' - W, D> with W' as stored; of factors that
stand for a difference, `difference` is ||D||^2 and `difference_left` what they leave out of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

Measures = dict[str, float]
"""Sums over elements, so that those of chunks, and of tensors, add up."""

_UPDATE = ("base", "update", "effective")


def has_update(measures: Mapping[str, float]) -> bool:
    """True for a tensor whose update has a size: neither none nor one that is not finite."""
    return measures.get("update", 0) > 0 and all(math.isfinite(measures[k]) for k in _UPDATE)


def surviving_share(measured: Sequence[Mapping[str, float]]) -> float:
    """`<W' - W, D> / <D, D>`: 1 where rounding lost nothing of the update, 0 where the result is the base."""
    return sum(m["effective"] for m in measured) / sum(m["update"] for m in measured)


def relative_size(measured: Sequence[Mapping[str, float]]) -> float:
    """`||D|| / ||W||`."""
    base = sum(m["base"] for m in measured)
    return math.sqrt(sum(m["update"] for m in measured) / base) if base else math.inf


def energy_kept(measured: Sequence[Mapping[str, float]]) -> float:
    """The share of ||D||^2 that a pair of factors keeps, D the difference of two models or an update."""
    total = sum(m["difference"] for m in measured)
    return 1 - sum(m["difference_left"] for m in measured) / total if total else 1.0


def with_ratios(measures: Mapping[str, float]) -> dict[str, float | None]:
    """The sums and the two ratios, for the receipt; None for what is not finite, since JSON has no word for it.

    Nine digits: the order in which a machine adds shows in the last ones, and a receipt is the same bytes everywhere.
    """
    ratios: dict[str, float] = {}
    if has_update(measures):
        ratios = {"relative_size": relative_size([measures]), "surviving_share": surviving_share([measures])}
    if measures.get("requantised", 0) > 0:
        ratios["requantised_relative_error"] = math.sqrt(measures["requantised_error"] / measures["requantised"])
    if measures.get("difference", 0) > 0:
        ratios["energy_kept"] = energy_kept([measures])
        ratios["relative_error"] = math.sqrt(measures["difference_left"] / measures["difference"])
    return {k: float(f"{v:.9g}") if math.isfinite(v) else None for k, v in sorted({**measures, **ratios}.items())}
