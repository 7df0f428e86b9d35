"""A merge that tests of the writer disturb."""

from __future__ import annotations

from faulty_runs import merge, place

__all__ = ["merge", "place"]
