"""Reads a pasted error or a training log line by line and says what each known message means. Logs may be gigabytes."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from converter.errors import show
from converter.explanations import advice, loading, reports, training
from converter.explanations.model import Message

MESSAGES: tuple[Message, ...] = (*reports.MESSAGES, *loading.MESSAGES, *training.MESSAGES, *advice.MESSAGES)
"""In the order in which they are tried: the first that matches a line explains it."""

MAX_LINE = 20_000
"""Characters of one line that are looked at; a progress bar without newlines can make lines of megabytes."""

OVERLAP = 2_000
"""Characters that two pieces of an overlong line share."""

_KEYS = re.compile(b"|".join(re.escape(k).encode() for m in MESSAGES for k in m.keys))
_ANSI = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")


@dataclass
class Seen:
    """A message found in a text.

    Attributes:
        line: number of its first line, from 1.
        example: that line, escaped and capped.
        groups: what the pattern's names matched there.
    """

    message: Message
    line: int
    example: str
    groups: dict[str, str] = field(default_factory=dict)
    count: int = 1

    @property
    def text(self) -> str:
        """What it means, with the names of this case."""
        return self.message.filled(self.groups)


def lines_of(blocks: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """Lines of a stream as they come, with their numbers as editors count them.

    A carriage return ends a line too (progress bars), without counting; an overlong line comes in pieces that overlap.
    UTF-16, as PowerShell writes logs, is read as text.
    """
    rest, number = b"", 1
    for block in _as_utf8(blocks):
        *whole, last = (rest + block).split(b"\n")
        for line in whole:
            if b"\r" in line:
                yield from ((number, piece) for piece in line.split(b"\r") if piece)
            else:
                yield number, line
            number += 1
        *done, rest = last.rsplit(b"\r", 1) if b"\r" in last[:-1] else [last]
        yield from ((number, piece) for each in done for piece in each.split(b"\r") if piece)
        if len(rest) > MAX_LINE:
            yield number, rest
            rest = rest[-OVERLAP:]
    if rest:
        yield number, rest


def _as_utf8(blocks: Iterable[bytes]) -> Iterator[bytes]:
    decoder = None
    for number, block in enumerate(blocks):
        if number == 0 and block[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            decoder = codecs.getincrementaldecoder("utf-16")("replace")
        yield block if decoder is None else decoder.decode(block).encode("utf-8", "replace")


def _windows(line: bytes) -> Iterator[bytes]:
    """The parts of a line that may hold a message: all of it, or the surroundings of each key in an overlong one."""
    if len(line) <= MAX_LINE:
        if _KEYS.search(line) is not None:
            yield line
        return
    at = 0
    while (found := _KEYS.search(line, at)) is not None:
        start = max(at, found.start() - OVERLAP)
        at = found.start() + MAX_LINE - OVERLAP
        yield line[start:at]


def match(text: str) -> tuple[Message, dict[str, str]] | None:
    """The first known message in a line, with what its names matched."""
    for message in MESSAGES:
        if any(key in text for key in message.keys) and (found := message.regex.search(text)):
            groups = {k: show(v.strip("'\"")) for k, v in found.groupdict().items() if v is not None}
            return message, groups
    return None


def read(lines: Iterable[tuple[int, bytes]]) -> Iterator[tuple[Seen, bool]]:
    """Every message found, as it is found: with True where it is new, False where it only came again."""
    seen: dict[str, Seen] = {}
    for number, line in lines:
        for window in _windows(line):
            text = _ANSI.sub("", window.decode("utf-8", "replace"))
            found = match(text)
            if found is None:
                continue
            message, groups = found
            is_new = message.name not in seen
            if is_new:
                seen[message.name] = Seen(message, number, show(_around(text, message), 160), groups)
            else:
                seen[message.name].count += 1
            yield seen[message.name], is_new


def _around(text: str, message: Message) -> str:
    """The text from its beginning, or from shortly before the message where that is far in."""
    found = message.regex.search(text)
    start = found.start() if found is not None and found.start() > 100 else 0
    return text[start:].strip()
