"""Follows Python's tracebacks through a log: which exception ended each, where it was raised, and what was going on.

Every rank writes its own, behind its own prefix; launchers, Ray and `raise ... from` chain them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

HEAD = "Traceback (most recent call last)"
"""What a line must hold to begin one."""

_MOST_OPEN = 64
_MOST_LINES = 3_000
_MOST_CONTINUED = 8
_MOST_STRANGE = 3
_MOST_ROWS = 60
"""How many tracebacks are followed at once, and through how many lines; how many lines the text of an exception may
have, how many lines of others may stand before the next of its chain, and how long torchrun's table may be."""

_FRAME = re.compile(r'\s*File "(?P<file>[^"]{1,500})", line (?P<line>\d{1,7})(?:, in (?P<function>.{1,200}))?')
_RICH_FRAME = re.compile(r"[│|] (?P<file>\S{1,400}\.py):(?P<line>\d{1,7}) in (?P<function>\w{1,200})")
_EXCEPTION = re.compile(r"(?P<name>(?:[A-Za-z_]\w{0,80}\.){0,12}[A-Za-z_]\w{0,80}(?:\([\w.]{1,200}\))?)(?::(?: .*)?)?$")
_ENDS = re.compile(
    r"(?:Error|Exception|Exit|Interrupt|Warning|Timeout|Group|Again|Empty|Full|Iteration|Died|Failed|Failure|"
    r"Cancelled|Abort|Fault|NotFound|\([\w.]+\))$"
)
_CHAINED = re.compile(
    r"During handling of the above exception, another exception occurred|"
    r"The above exception was the direct cause of the following exception"
)
_IGNORED = re.compile(r"Exception ignored (?:in|on|while)")
_RECORD = re.compile(r"[\[({]|\d{4}-\d\d|\d\d:\d\d|W\d{4} |E\d{4} |I\d{4} |(?:INFO|WARNING|ERROR|DEBUG)\b")
_ROW = re.compile(r"\s+(?P<key>host|rank|exitcode|traceback)\s*: (?P<value>.{0,300})")
_PACKAGE = re.compile(r"(?:site|dist)-packages/(?P<name>[A-Za-z_]\w*)")
_STDLIB = re.compile(r"(?:^|/)lib(?:64)?/python3\.\d+/(?!(?:site|dist)-packages/)|^<frozen ")


@dataclass(frozen=True)
class Frame:
    """A line of a traceback that names a place in the code."""

    file: str
    line: int
    function: str

    @property
    def package(self) -> str | None:
        """The installed package that it is in; None for a script of the user's own and for Python itself."""
        found = _PACKAGE.search(self.file)
        return found["name"] if found else None

    @property
    def place(self) -> str:
        """The file as its package names it, with the line."""
        found = _PACKAGE.search(self.file)
        return f"{self.file[found.start('name') :] if found else self.file}:{self.line}"


@dataclass
class Ended:
    """A traceback that has been read whole.

    Attributes:
        exception: the name of what was raised, with its module where that is printed; empty where the log stops before.
        line: the number of the line with the exception, or of the first line where there is none.
        example: that line.
        frames: from the outermost to the innermost, of every exception of the chain.
        is_known: an exception of the chain, or a line of its text, is a message that is known.
        is_ignored: Python itself says that it ignored the exception, as in a destructor.
        root: what torchrun says of the worker that ended first, by name.
    """

    exception: str
    line: int
    example: str
    frames: tuple[Frame, ...]
    is_known: bool
    is_ignored: bool = False
    root: dict[str, str] = field(default_factory=dict)

    @property
    def raised_in(self) -> Frame | None:
        """The innermost place that is not Python's own."""
        return next((f for f in reversed(self.frames) if not _STDLIB.search(f.file)), None)


@dataclass
class _Open:
    prefix: re.Pattern[str]
    line: int
    example: str
    is_ignored: bool
    frames: list[Frame] = field(default_factory=list)
    exception: str = ""
    is_known: bool = False
    is_chained: bool = False
    in_frames: bool = True
    follows_frame: bool = False
    read: int = 0
    continued: int = 0
    strange: int = 0
    rows: int = 0
    has_paused: bool = False
    root: dict[str, str] | None = None

    def ended(self) -> Ended:
        return Ended(
            self.exception,
            self.line,
            self.example,
            tuple(self.frames),
            self.is_known,
            self.is_ignored,
            {k: v for k, v in (self.root or {}).items() if k != "is_root"},
        )


class Tracebacks:
    """Tracebacks that are being read.

    Args:
        live: a traceback is over with the line of its exception, since nobody knows whether more will come.
    """

    def __init__(self, *, live: bool = False) -> None:
        self._open: list[_Open] = []
        self._live = live
        self._ignored_after = -1

    @property
    def is_open(self) -> bool:
        """True where the next lines may belong to a traceback."""
        return bool(self._open)

    @property
    def has_table(self) -> bool:
        """True inside of torchrun's table of the workers that ended."""
        return any(each.root is not None for each in self._open)

    def is_source(self, text: str) -> bool:
        """True for a line of source code under a frame: what it quotes was not printed by the program."""
        behind = ((each.prefix.match(text), each) for each in self._open if each.follows_frame)
        return any(found is not None and text[found.end() :][:4] == "    " for found, _ in behind)

    def read(self, number: int, text: str, *, is_known: bool) -> Iterator[Ended]:
        """Take the next line, and give the tracebacks that it ends.

        Args:
            is_known: the line holds a message that explains a crash.
        """
        at = text.find(HEAD)
        if at >= 0:
            yield from self._begin(number, text, at)
            return
        if _IGNORED.search(text):
            self._ignored_after = number
        for each in [*self._open]:
            found = each.prefix.match(text)
            each.read += 1
            if found is not None:
                _take(each, number, text[found.end() :].rstrip(), is_known=is_known)
            if each.read > _MOST_LINES or (not each.in_frames and self._is_over(each)):
                self._open.remove(each)
                yield each.ended()

    def rest(self) -> Iterator[Ended]:
        """What is still open when the log ends."""
        yield from (each.ended() for each in self._open)
        self._open.clear()

    def _is_over(self, each: _Open) -> bool:
        if each.root is not None:
            return each.rows > _MOST_ROWS or "exitcode" in each.root
        return each.strange > _MOST_STRANGE or (self._live and not each.exception.endswith(")"))

    def _begin(self, number: int, text: str, at: int) -> Iterator[Ended]:
        before = text[:at]
        grouped = "Exception Group" in before or "+" in before[-4:] or "─" in before
        prefix = re.compile(r"[\s|+│]*" if grouped else _shape(before))
        for each in [*self._open]:
            if each.prefix.pattern != prefix.pattern:
                continue
            if each.is_chained or each.in_frames:
                each.in_frames, each.is_chained = True, False
                return
            self._open.remove(each)
            yield each.ended()
        if len(self._open) >= _MOST_OPEN:
            yield self._open.pop(0).ended()
        self._open.append(_Open(prefix, number, text, self._ignored_after == number - 1))


def name_of_error(line: str) -> str | None:
    """The exception that the last line of a traceback names; None for other lines."""
    found = _EXCEPTION.match(line.strip())
    return found["name"] if found is not None and _ENDS.search(found["name"]) else None


def _shape(before: str) -> str:
    """A prefix as a pattern: the numbers of a clock may differ, those of a rank or a process may not."""
    pieces = re.split(r"(\d+(?:[-:/.,T ]\d+)+)", before[-300:])
    return "".join(re.sub(r"\d+", r"\\d+", re.escape(p)) if n % 2 else re.escape(p) for n, p in enumerate(pieces))


def _take(each: _Open, number: int, body: str, *, is_known: bool) -> None:
    frame = _FRAME.match(body) or _RICH_FRAME.match(body.strip())
    if frame is not None:
        each.frames = [*each.frames[-200:], Frame(frame["file"], int(frame["line"]), frame["function"] or "")]
        each.in_frames, each.follows_frame = True, True
        return
    if each.root is not None and not each.in_frames:
        _take_row(each, body)
        return
    if each.in_frames:
        _take_exception(each, number, body, is_known=is_known)
        each.follows_frame = body[:1].isspace() and each.follows_frame
        return
    if not body:
        each.has_paused = True
    elif _CHAINED.search(body):
        each.is_chained = True
    elif not each.has_paused and each.continued < _MOST_CONTINUED and not _RECORD.match(body):
        each.continued += 1
        each.is_known = each.is_known or is_known
    else:
        each.has_paused = True
        each.strange += 1


def _take_exception(each: _Open, number: int, body: str, *, is_known: bool) -> None:
    if not body or body[0].isspace() or body[0] in "│╭╰|+":
        return
    found = _EXCEPTION.match(body)
    if found is None or not (_ENDS.search(found["name"]) or (each.follows_frame and _is_class(found["name"]))):
        each.follows_frame = False
        return
    each.exception, each.line, each.example = found["name"], number, body
    each.in_frames, each.has_paused, each.continued, each.strange = False, False, 0, 0
    each.is_known = each.is_known or is_known
    if found["name"].endswith("ChildFailedError"):
        each.root = {}


def _is_class(name: str) -> bool:
    return "." in name or name[0].isupper()


def _take_row(each: _Open, body: str) -> None:
    """A row of the table in which torchrun says which worker ended first."""
    assert each.root is not None
    each.rows += 1
    if body.startswith("Root Cause"):
        each.root["is_root"] = ""
    row = _ROW.match(body)
    if row is not None and "is_root" in each.root:
        each.root[row["key"]] = row["value"].strip()
