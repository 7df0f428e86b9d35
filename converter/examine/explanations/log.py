"""Reads a pasted error or a training log line by line and says what each known message means. Logs may be gigabytes."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache

from converter.examine.explanations import advice, loading, reports, training
from converter.examine.explanations.message import Message
from converter.text import show

MESSAGES: tuple[Message, ...] = (*reports.MESSAGES, *loading.MESSAGES, *training.MESSAGES, *advice.MESSAGES)
"""In the order in which they are tried: the first that matches a line explains it."""

MAX_LINE = 20_000
"""Characters of one line that are looked at; a progress bar without newlines can make lines of megabytes."""

OVERLAP = 2_000
"""Characters that two pieces of an overlong line share."""

_ALL_KEYS = frozenset(key.encode() for message in MESSAGES for key in message.keys)
_KEYS = tuple(sorted(key for key in _ALL_KEYS if not any(other in key for other in _ALL_KEYS - {key})))
"""What a line must hold one of to be looked at."""


@lru_cache(maxsize=64)
def _any_of(keys: tuple[bytes, ...]) -> re.Pattern[bytes]:
    return re.compile(b"|".join(map(re.escape, keys)))


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


def _as_utf8(blocks: Iterable[bytes]) -> Iterator[bytes]:
    decoder = None
    for number, block in enumerate(blocks):
        if number == 0 and block[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            decoder = codecs.getincrementaldecoder("utf-16")("replace")
        yield block if decoder is None else decoder.decode(block).encode("utf-8", "replace")


def _candidates(blocks: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """Lines that hold a key, with their numbers as editors count them; of an overlong line the key's surroundings.

    A carriage return ends a line too (progress bars), without counting. Most of a log is never cut into lines.
    """
    rest, number = b"", 1
    for block in _as_utf8(blocks):
        data = rest + block
        end = max(data.rfind(b"\n"), data.rfind(b"\r")) + 1
        is_overlong = len(data) - end > MAX_LINE
        end = len(data) if is_overlong else end
        yield from _found(data, end, number)
        number += data.count(b"\n", 0, end)
        rest = data[-OVERLAP:] if is_overlong else data[end:]
    yield from _found(rest, len(rest), number)


def _found(data: bytes, end: int, number: int) -> Iterator[tuple[int, bytes]]:
    # Few keys are in a block, and to ask for each is many times faster than one search for all.
    present = tuple(key for key in _KEYS if key in data)
    if not present:
        return
    keys = _any_of(present)
    at = counted = 0
    while (hit := keys.search(data, at, end)) is not None:
        lower = max(at, hit.start() - OVERLAP)
        before = max(data.rfind(b"\n", lower, hit.start()), data.rfind(b"\r", lower, hit.start()))
        start = lower if before < 0 else before + 1
        ends = [i for i in (data.find(c, hit.start(), start + MAX_LINE) for c in (b"\n", b"\r")) if i >= 0]
        at = min(*ends, end, start + MAX_LINE) if ends else min(end, start + MAX_LINE)
        number += data.count(b"\n", counted, start)
        counted = start
        yield number, data[start:at]
        at = max(at, hit.end())


def match(text: str) -> tuple[Message, dict[str, str]] | None:
    """The first known message in a line, with what its names matched."""
    for message in MESSAGES:
        if any(key in text for key in message.keys) and (found := message.regex.search(text)):
            groups = {k: show(v.strip("'\"")) for k, v in found.groupdict().items() if v is not None}
            return message, groups
    return None


def read(blocks: Iterable[bytes]) -> Iterator[tuple[Seen, bool]]:
    """Every message found, as it is found: with True where it is new, False where it only came again."""
    seen: dict[str, Seen] = {}
    for number, line in _candidates(blocks):
        text = _ANSI.sub("", line.decode("utf-8", "replace"))
        found = match(text)
        if found is None:
            continue
        message, groups = found
        is_new = message.code not in seen
        if is_new:
            seen[message.code] = Seen(message, number, show(_around(text, message), 160), groups)
        else:
            seen[message.code].count += 1
        yield seen[message.code], is_new


def _around(text: str, message: Message) -> str:
    """The text from its beginning, or from shortly before the message where that is far in."""
    found = message.regex.search(text)
    start = found.start() if found is not None and found.start() > 100 else 0
    return text[start:].strip()
