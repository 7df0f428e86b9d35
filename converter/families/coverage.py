"""Which set of weight files in a folder is the model: the one that alone covers what config.json implies, once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from converter.core.checkpoint import WeightSet
from converter.families import implied
from converter.text import fold, show

_EMPTY = (0,)


@dataclass(frozen=True)
class Judged:
    """A set, and what keeps it from being the model.

    Attributes:
        lacks: in words; nothing where it covers what the config implies.
        empty: tensors that are torch.Size([0]): no fault of the files, and filled from where they still are.
        total: tensors in it, each counted once.
    """

    set: WeightSet
    lacks: tuple[str, ...]
    empty: int
    total: int

    @property
    def covers(self) -> bool:
        """True where it is the model, whole."""
        return not self.lacks and not self.empty

    @property
    def words(self) -> str:
        """The set with what it lacks."""
        empty = f"{self.empty} tensors are torch.Size([0])" if self.empty else ""
        return f"{show(self.set.name)}: {'; '.join(filter(None, (*self.lacks, empty))) or f'all {self.total} tensors'}"


def judged(sets: Sequence[WeightSet], config: Mapping[str, Any]) -> tuple[Judged, ...]:
    """Every set with what it lacks, by headers alone."""
    return tuple(_judged(each, config) for each in sets)


def _judged(each: WeightSet, config: Mapping[str, Any]) -> Judged:
    shapes = {n: t.info.shape for n, t in each.tensors.items()}
    other = [n for n, files in each.twice.items() if any(each.files[f][n].info != each.tensors[n].info for f in files)]
    lacks = [*each.faults, *implied.lacks(shapes, config)]
    if other:
        lacks.append(f"{fold(other)} in two files with different shapes or dtypes")
    empty = sum(s == _EMPTY for s in shapes.values())
    return Judged(each, tuple(lacks), empty, len(shapes))
