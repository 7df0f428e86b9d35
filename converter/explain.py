"""Reads a pasted error or a training log line by line and says what each known message means. Logs may be gigabytes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from converter.errors import show
from converter.explanations import loading, training
from converter.explanations.model import Message

MESSAGES: tuple[Message, ...] = (*loading.MESSAGES, *training.MESSAGES)
"""In the order in which they are tried: the first that matches a line explains it."""

MAX_LINE = 20_000
"""Characters of one line that are looked at; a progress bar without newlines can make lines of megabytes."""

_KEYS = re.compile(b"|".join(re.escape(k).encode() for m in MESSAGES for k in m.keys))
_END = re.compile(rb"\r?\n|\r")
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
        return _filled(self.message.text, self.groups)


def _filled(text: str, groups: dict[str, str]) -> str:
    for name, value in groups.items():
        text = text.replace(f"{{{name}}}", value)
    return text


def lines_of(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """Lines of a stream as they come; carriage returns end a line too, and overlong lines are cut in pieces."""
    rest = b""
    for block in blocks:
        *whole, rest = _END.split(rest + block)
        yield from whole
        if len(rest) > MAX_LINE:
            yield rest
            rest = b""
    if rest:
        yield rest


def match(text: str) -> tuple[Message, dict[str, str]] | None:
    """The first known message in a line, with what its names matched."""
    for message in MESSAGES:
        if any(key in text for key in message.keys) and (found := message.regex.search(text)):
            groups = {k: show(v.strip("'\"")) for k, v in found.groupdict().items() if v is not None}
            return message, groups
    return None


def read(lines: Iterable[bytes]) -> Iterator[tuple[Seen, bool]]:
    """Every message found, as it is found: with True where it is new, False where it only came again."""
    seen: dict[str, Seen] = {}
    for number, line in enumerate(lines, start=1):
        if _KEYS.search(line) is None:
            continue
        text = _ANSI.sub("", line[:MAX_LINE].decode("utf-8", "replace"))
        found = match(text)
        if found is None:
            continue
        message, groups = found
        if message.name in seen:
            seen[message.name].count += 1
            yield seen[message.name], False
        else:
            seen[message.name] = Seen(message, number, show(text.strip(), 160), groups)
            yield seen[message.name], True
