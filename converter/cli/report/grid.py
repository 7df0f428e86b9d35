"""Tensors as a grid of layers and projections, from what was measured of each while it was written."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from converter.core.compute.measures import has_update, relative_size, surviving_share

T = TypeVar("T")

_LAYER = re.compile(r"(?:^|\.)(\d+)\.")
_EXPERT = re.compile(r"\bexperts\.\d+\.")


@dataclass(frozen=True)
class Grid:
    """A value for each layer and projection; None where there is none.

    Attributes:
        rows: projections, in the order in which they were met.
        columns: layers.
        values: row by row.
    """

    rows: Sequence[str]
    columns: Sequence[int]
    values: Sequence[Sequence[float | None]]

    @property
    def known(self) -> list[tuple[str, int, float]]:
        """Projection, layer and value of every cell that has one."""
        return [
            (row, column, value)
            for row, line in zip(self.rows, self.values, strict=True)
            for column, value in zip(self.columns, line, strict=True)
            if value is not None
        ]


def place_of(name: str) -> tuple[str, int] | None:
    """The projection and the layer that a tensor's name says; experts of a layer are one; None outside of layers."""
    found = _LAYER.search(name)
    if found is None:
        return None
    rest = _EXPERT.sub("experts.*.", name[found.end() :])
    for word in (".lora_A", ".lora_B", ".default", ".weight"):
        rest = rest.replace(word, "")
    return rest, int(found[1])


def grid_of(tensors: Mapping[str, T], value: Callable[[Sequence[T]], float | None]) -> Grid:
    """What a function makes of all that lies in one cell."""
    cells: dict[tuple[str, int], list[T]] = {}
    for name, each in tensors.items():
        place = place_of(name)
        if place is not None:
            cells.setdefault(place, []).append(each)
    rows = list(dict.fromkeys(row for row, _ in cells))
    columns = sorted({column for _, column in cells})
    values = [[value(cells[r, c]) if (r, c) in cells else None for c in columns] for r in rows]
    return Grid(rows, columns, values)


def outside(names: Iterable[str]) -> list[str]:
    """Names that belong to no layer: embeddings, heads, the last norm."""
    return [name for name in names if place_of(name) is None]


def updated(measures: Mapping[str, Mapping[str, float]]) -> dict[str, Mapping[str, float]]:
    """Tensors whose update has a size."""
    return {name: m for name, m in measures.items() if has_update(m)}


def sizes(measures: Mapping[str, Mapping[str, float]]) -> Grid:
    """How large the update of each cell is, relative to its weights."""
    return grid_of(updated(measures), lambda found: _finite(relative_size(found)))


def swallowed(measures: Mapping[str, Mapping[str, float]]) -> Grid:
    """The share of each cell's update that rounding swallowed, or, where it made the update larger, added."""
    return grid_of(updated(measures), lambda found: _finite(abs(1 - surviving_share(found))))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
