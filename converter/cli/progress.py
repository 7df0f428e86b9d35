"""Progress on stderr: a bar with bytes, rate, time left and tensor on a terminal; else one line per shard."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from converter.cli.sink import Sink
from converter.text import format_duration, format_size, show

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from converter.core.writer.reporter import Reporter


class Lines:
    """One line per finished shard."""

    def __init__(self, sink: Sink) -> None:
        self.sink = sink
        self._began = time.monotonic()
        self._done = self._shards = 0
        self._lock = threading.Lock()

    def start(self, total_bytes: int, shards: int) -> None:
        """Remember how many files there will be."""
        self._shards = shards
        self._began = time.monotonic()

    def advance(self, count: int, tensor: str) -> None:
        """Nothing: a log is not a place for a moving bar."""

    def shard_done(self, file: str, size: int, resumed: bool) -> None:
        """`2/4  model-00002-of-00004.safetensors  4.98 GB  0:11`."""
        with self._lock:
            self._done += 1
            when = "written by an earlier run" if resumed else format_duration(time.monotonic() - self._began)
            self.sink.tell(f"{self._done}/{self._shards}  {file}  {format_size(size)}  {when}")

    def checking(self) -> None:
        """Nothing: the result says what was checked."""


class Bar:
    """A bar that rich draws, from the start of a run on; a second start begins it anew."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task: TaskID | None = None

    def start(self, total_bytes: int, shards: int) -> None:
        """Show the bar."""
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._task = self._progress.add_task("", total=total_bytes)
        self._progress.start()

    def advance(self, count: int, tensor: str) -> None:
        """Move it; the tensor's name stands beside it."""
        if self._task is not None:
            self._progress.update(self._task, advance=count, description=show(tensor, 48))

    def shard_done(self, file: str, size: int, resumed: bool) -> None:
        """Nothing: the bar shows it."""

    def checking(self) -> None:
        """Say so in place of a tensor's name."""
        if self._task is not None:
            self._progress.update(self._task, description="checking")


@contextmanager
def progress(sink: Sink) -> Iterator[Reporter]:
    """The reporter that fits: silent with `-q`, a bar on a terminal, lines elsewhere."""
    if sink.quiet or not sys.stderr.isatty():
        yield Lines(sink)
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (BarColumn(24), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    name = TextColumn("{task.description}", markup=False)
    # Transient: the screen's own line about the shards takes the bar's place.
    bar = Progress(*columns, name, console=Console(stderr=True), transient=True)
    try:
        yield Bar(bar)
    finally:
        bar.stop()
