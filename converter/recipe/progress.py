"""How far a run is: a bar with bytes, rate, time left and tensor on a terminal or in a notebook; else a line per shard.

with converter.progress() as reporter:
converter.gather(run, out, reporter=reporter)
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from converter.recipe.pace import Pace
from converter.text import format_duration, format_size, show

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID
    from rich.status import Status

QUIET_SECONDS = 60
"""A log without a line for so long gets one: a single file may take an hour."""

PATIENCE_SECONDS = 0.4
"""Planning that takes longer is shown on a terminal."""


class Lines:
    """One line per finished shard, and one a minute in between."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._began = self._told = time.monotonic()
        self._done = self._shards = self._total = 0
        self._pace = Pace(0, {}, self._began)
        self._lock = threading.Lock()

    def hide(self) -> None:
        """Nothing: lines stay."""

    def start(self, total_bytes: int, shards: int) -> None:
        """Remember how much there will be."""
        self._shards, self._total, self._done = shards, total_bytes, 0
        self._began = self._told = time.monotonic()
        self._pace = Pace(total_bytes, {}, self._began)

    def computing(self, sizes: Mapping[str, int]) -> None:
        """Time left is that of copies and of computed tensors, each at its own rate."""
        self._pace = Pace(self._total, sizes, self._began)

    def advance(self, count: int, tensor: str) -> None:
        """`11.1 GB of 30.0 GB  212 MB/s  1:29 left  model.layers.3.mlp.up_proj.weight`, where a minute was silent."""
        with self._lock:
            now = time.monotonic()
            self._pace.note(count, tensor, threading.get_ident(), now)
            if now - self._told < QUIET_SECONDS:
                return
            self._told = now
            done, rate, left = self._pace.done, self._pace.rate(now), self._pace.left(now)
            words = [f"{format_size(done)} of {format_size(self._total)}", f"{format_size(int(rate))}/s"]
            if left is not None and done < self._total:
                words.append(f"{format_duration(left)} left")
            self._tell("  ".join([*words, show(tensor, 48)] if tensor else words))

    def shard_done(self, file: str, size: int, resumed: bool) -> None:
        """`2/4  model-00002-of-00004.safetensors  4.98 GB  0:11`."""
        with self._lock:
            self._done += 1
            self._pace.found(size if resumed else 0)
            self._told = time.monotonic()
            when = "written by an earlier run" if resumed else format_duration(self._told - self._began)
            self._tell(f"{self._done}/{self._shards}  {file}  {format_size(size)}  {when}")

    def checking(self, what: str) -> None:
        """Nothing: the result says what was checked."""


class Bar:
    """A bar that rich draws, from the start of a run on; a second start begins it anew.

    Before the first start a spinner says that headers are read, once that takes noticeably long.
    """

    def __init__(self) -> None:
        self._there = self._total = 0
        self._pace = Pace(0, {}, time.monotonic())
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._planning: Status | None = None
        self._lock = threading.Lock()
        self._is_hidden = False
        self._timer = threading.Timer(PATIENCE_SECONDS, self._show_planning)
        self._timer.daemon = True
        self._timer.start()

    def _show_planning(self) -> None:
        with self._lock:
            if not self._is_hidden:
                self._planning = _console().status("reading headers", spinner="line")
                self._planning.start()

    def hide(self) -> None:
        """Take the spinner away: lines are going to be printed."""
        self._timer.cancel()
        with self._lock:
            self._is_hidden = True
            if self._planning is not None:
                self._planning.stop()

    def start(self, total_bytes: int, shards: int) -> None:
        """Show the bar."""
        self.hide()
        if self._bar is None:
            self._bar = _bar()
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._there, self._total = 0, total_bytes
        self._pace = Pace(total_bytes, {}, time.monotonic())
        self._task = self._bar.add_task("", total=total_bytes, left="")
        self._bar.start()

    def computing(self, sizes: Mapping[str, int]) -> None:
        """Time left is that of copies and of computed tensors, each at its own rate."""
        self._pace = Pace(self._total, sizes, time.monotonic())

    def advance(self, count: int, tensor: str) -> None:
        """Move it; the tensor's name stands beside it."""
        if self._bar is not None and self._task is not None:
            now = time.monotonic()
            with self._lock:
                self._pace.note(count, tensor, threading.get_ident(), now)
                left = self._pace.left(now)
            told = "" if left is None else format_duration(left)
            self._bar.update(self._task, advance=count, description=show(tensor, 48), left=told)

    def shard_done(self, file: str, size: int, resumed: bool) -> None:
        """Begin at what an earlier run wrote: rate and time left are those of this run."""
        if resumed and self._bar is not None and self._task is not None:
            self._there += size
            self._pace.found(size)
            self._bar.reset(self._task, completed=self._there)

    def checking(self, what: str) -> None:
        """Say so in place of a tensor's name."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, description=f"checking {what}")

    def stop(self) -> None:
        """Take all of it away."""
        self.hide()
        if self._bar is not None:
            self._bar.stop()


def _console() -> Console:
    from rich.console import Console

    return Console(stderr=True)


def _bar() -> Progress:
    """Transient: the screen's own line about the shards takes the bar's place. Standard output may be a file."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (BarColumn(24), DownloadColumn(), TransferSpeedColumn(), TextColumn("{task.fields[left]}", markup=False))
    name = TextColumn("{task.description}", markup=False)
    return Progress(*columns, name, console=_console(), transient=True, redirect_stdout=False)


def _on_stderr(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


@contextmanager
def progress(tell: Callable[[str], None] = _on_stderr) -> Iterator[Bar | Lines]:
    """What a function of this library takes as `reporter=`: a bar where one can be drawn, else lines.

    Args:
        tell: prints a line.
    """
    if not (sys.stderr.isatty() or "ipykernel" in sys.modules):
        yield Lines(tell)
        return
    bar = Bar()
    try:
        yield bar
    finally:
        bar.stop()
