"""The conversion matrix, each cell judged by the source's and the target's own loaders; writes it as a table."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from cells import SOURCES, TARGETS, Cell, Source, Target, expected, table
from matrix import run_matrix

pytestmark = pytest.mark.trainer


@pytest.fixture(scope="session")
def cells(envs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Cell]:
    """Every cell whose environments are built; the table goes where RLHF_CONVERT_MATRIX says."""
    found = run_matrix(envs, tmp_path_factory.mktemp("matrix"))
    if given := os.environ.get("RLHF_CONVERT_MATRIX"):
        Path(given).write_text(table(found), encoding="utf-8")
    return found


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.name)
@pytest.mark.parametrize("source", SOURCES, ids=lambda s: s.name)
def test_a_cell_is_lossless_or_loses_the_stated_constant_and_no_more_or_is_refused(
    cells: dict[tuple[str, str], Cell], source: Source, target: Target
) -> None:
    cell = cells.get((source.name, target.name))
    if cell is None:
        pytest.skip(f"{source.environment} or {target.environment} is not built")
    assert cell.outcome == expected(source, target), cell.detail
    assert bool(cell.refused) == (cell.outcome == "shift"), "what loses numbers is refused first, and nothing else is"
