"""A report into its file. It is the last thing that a run does, and its failure is a line and no exit code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from converter.text import show

if TYPE_CHECKING:
    from converter.cli.report.grid import Grid
    from converter.cli.report.page import Page
    from converter.cli.sink import Sink


def write_report(
    report: str | None, sink: Sink, page: Callable[[], Page], grid: Callable[[], Grid | None] = lambda: None
) -> None:
    """Draw and write what was asked for; nothing where nothing was.

    Args:
        report: the file, `.html` or `.png`.
        page: makes the page; called where there is a report to write.
        grid: makes the grid of a card.
    """
    if report is None:
        return
    path = Path(report).expanduser()
    try:
        if path.suffix.lower() == ".png":
            from converter.cli.report.figures import card

            made = page()
            content = card(made.title, made.facts, grid(), "relative size of the change")
        else:
            from converter.cli.report.page import as_html

            content = as_html(page()).encode()
        path.write_bytes(content)
    except Exception as failed:  # what was asked for is done; a picture of it changes no exit code
        sink.tell(f"the report was not written: {type(failed).__name__}: {show(failed)}")
        return
    sink.tell(f"report   {show(report)}")
