"""How far a run is, as the user asked to hear of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from converter.cli.sink import Sink
from converter.recipe.progress import Bar, Lines
from converter.recipe.progress import progress as on_stderr


@contextmanager
def progress(sink: Sink) -> Iterator[Bar | Lines]:
    """The reporter that fits: silent with `-q`, else as of the library."""
    if sink.quiet:
        yield Lines(sink.tell)
        return
    with on_stderr(sink.tell) as reporter:
        yield reporter
