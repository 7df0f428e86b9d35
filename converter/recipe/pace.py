"""How long a run still takes, from what a byte that is copied and one that is computed have cost so far."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass
class _Kind:
    """Bytes of one kind: how many there are in all, how many were written, and what those that were timed cost."""

    total: int = 0
    written: int = 0
    timed: int = 0
    seconds: float = 0.0

    @property
    def cost(self) -> float | None:
        """Seconds of one worker for a byte; None before one was timed."""
        return self.seconds / self.timed if self.timed else None


class Pace:
    """Seconds that are left of a run whose copied and computed tensors go at different rates.

    A worker's time from one report to its next belongs to the bytes of the latter.

    Args:
        total: bytes of the whole run.
        computed: bytes of the tensors that are computed, by name; all others are copied.
        began: seconds of a monotonic clock.
    """

    def __init__(self, total: int, computed: Mapping[str, int], began: float) -> None:
        self._computed = computed
        both = sum(computed.values())
        self._kinds = {False: _Kind(total - both), True: _Kind(both)}
        self._began = began
        self._last: dict[int, float] = {}
        self._total, self._there = total, 0

    @property
    def done(self) -> int:
        """Bytes that are there, those of an earlier run among them."""
        return self._there + self._written

    @property
    def _written(self) -> int:
        return sum(kind.written for kind in self._kinds.values())

    def found(self, size: int) -> None:
        """`size` bytes were there before: of both kinds, as far as is known, as the rest."""
        self._there += size

    def note(self, count: int, tensor: str, worker: int, now: float) -> None:
        """A worker wrote `count` more bytes of a tensor by `now`."""
        kind = self._kinds[tensor in self._computed]
        kind.written += count
        if worker in self._last:
            kind.timed += count
            kind.seconds += max(now - self._last[worker], 0.0)
        self._last[worker] = now

    def rate(self, now: float) -> float:
        """Bytes a second of this run so far."""
        return self._written / max(now - self._began, 1e-9)

    def left(self, now: float) -> float | None:
        """Seconds until all bytes are written; None where nothing is known yet."""
        if not self._written:
            return None
        to_write = max(self._total - self._there, 1)
        seconds = 0.0
        for kind in self._kinds.values():
            rest = max(kind.total * to_write / max(self._total, 1) - kind.written, 0.0)
            if kind.cost is None:
                seconds += rest / self.rate(now)
            else:
                seconds += rest * kind.cost / len(self._last)
        return seconds
