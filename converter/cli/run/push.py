"""`rlhf-convert push`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from converter.cli.lines import line, next_lines
from converter.cli.options import Reading
from converter.cli.progress import progress
from converter.diagnostic import Command
from converter.recipe.progress import Bar, Lines
from converter.recipe.verbs import push as verb
from converter.recipe.verbs.push import Push
from converter.text import fold, format_size, show

if TYPE_CHECKING:
    from converter.cli.sink import Sink


def push(folder: str, repo: str, options: Reading, **knobs: Any) -> int:
    """Push a folder."""
    sink = options.sink
    with _telling(sink) as (reporter, client_bars):

        def show_plan(planned: Push) -> None:
            reporter.hide()
            sink.screen(_plan(planned, public=knobs.get("public", False)))

        done = verb.push(folder, repo, reporter=reporter, client_bars=client_bars, on_plan=show_plan, **knobs)
    assert done.manifest is not None
    if done.pushed is None:
        sink.screen(["dry run: nothing sent"])
        sink.json(_json(done))
        return 0
    where, files = done.destination, done.manifest.files
    sent = f"{len(done.pushed.sent)} of {len(files)} files sent" if done.pushed.sent else "all was there already"
    branch = "" if where.revision == "main" else f"@{where.revision}"
    sink.screen(
        [
            line("checked", f"{len(files)} files: path, size and digest as here; {sent}"),
            line("pushed", done.pushed.url),
            *next_lines([Command("inspect", (f"hf://{where.repo_id}{branch}",))]),
        ]
    )
    sink.json(_json(done))
    return 0


class _ThenLines:
    """A bar while files are read, and lines while they are sent."""

    def __init__(self, reading: Bar | Lines, sending: Lines) -> None:
        self._now: Bar | Lines = reading
        self._next = sending
        self._starts = 0

    def hide(self) -> None:
        """Hand it on."""
        self._now.hide()

    def start(self, total_bytes: int, shards: int) -> None:
        """The first start is that of reading, the second of sending."""
        self._starts += 1
        if self._starts == 2:
            self._now = self._next
        self._now.start(total_bytes, shards)

    def advance(self, count: int, tensor: str) -> None:
        """Hand it on."""
        self._now.advance(count, tensor)

    def shard_done(self, file: str, size: int, resumed: bool) -> None:
        """Hand it on."""
        self._now.shard_done(file, size, resumed)

    def checking(self, what: str) -> None:
        """Hand it on."""
        self._now.checking(what)


@contextmanager
def _telling(sink: Sink) -> Iterator[tuple[Bar | Lines | _ThenLines, bool]]:
    """What tells how far it is, and whether the client's bars stay on.

    Where files go by chunks (xet) they are not read through us: on a terminal the client's bars then say how far each
    is, and our lines which are there.
    """
    with progress(sink) as reporter:
        if sink.quiet or sink.as_json or not sys.stderr.isatty() or not _goes_by_chunks():
            yield reporter, False
        else:
            yield _ThenLines(reporter, Lines(sink.tell)), True


def _goes_by_chunks() -> bool:
    from huggingface_hub import constants

    return find_spec("hf_xet") is not None and not constants.HF_HUB_DISABLE_XET


def _plan(planned: Push, *, public: bool) -> list[str]:
    where, files = planned.destination, planned.files
    how = "public" if public else "private"
    to = f"{show(where.repo_id)} ({how}, if it is new)" + (f", as {show(planned.account)}" if planned.account else "")
    to += f", branch {show(where.revision)}" if where.revision != "main" else ""
    lines = [line("to", to), line("files", f"{len(files)}, {format_size(sum(f.size for f in files))}")]
    lines += [line("", f"{show(f.name)}  {format_size(f.size)}") for f in files[:20]]
    if len(files) > 20:
        lines.append(line("", f"and {len(files) - 20} more"))
    if planned.left_out:
        lines.append(line("left out", fold([show(n) for n in planned.left_out])))
    return lines


def _json(done: Push) -> dict[str, Any]:
    assert done.manifest is not None
    wanted = done.manifest
    return {
        "url": None if done.pushed is None else done.pushed.url,
        "sent": [] if done.pushed is None else list(done.pushed.sent),
        "files": [{"path": f.name, "size": f.size, "sha256": wanted.digests[f.name][0]} for f in wanted.files],
        "left_out": list(wanted.left_out),
    }
