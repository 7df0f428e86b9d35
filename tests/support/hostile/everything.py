"""All cases, in one table."""

from __future__ import annotations

from hostile import configs, containers, headers, papers, paths, pickles
from hostile.cases import Case, in_turn

CASES: list[Case] = in_turn(
    [*pickles.CASES, *containers.CASES, *headers.CASES, *paths.CASES, *configs.CASES, *papers.CASES]
)
