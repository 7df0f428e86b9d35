"""Reads a pasted error or a training log line by line and says what each known message means. Logs may be gigabytes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from converter.examine.explanations import (
    adapters,
    advice,
    crashes,
    engines,
    loading,
    megatron,
    reports,
    resuming,
    training,
)
from converter.examine.explanations.lines import Follow, Keys, candidates
from converter.examine.explanations.message import Message
from converter.examine.explanations.tracebacks import HEAD, Ended, Tracebacks, name_of_error
from converter.text import show

MESSAGES: tuple[Message, ...] = (
    *engines.MESSAGES,
    *resuming.MESSAGES,
    *adapters.MESSAGES,
    *megatron.MESSAGES,
    *reports.MESSAGES,
    *loading.MESSAGES,
    *training.MESSAGES,
    *advice.MESSAGES,
    *crashes.MESSAGES,
)
"""In the order in which they are tried: the first that matches a line explains it."""

_POSITIONS = tuple((key, position) for position, message in enumerate(MESSAGES) for key in message.keys)
_KEYS = frozenset(key.encode() for message in MESSAGES for key in message.keys)

_MOST_KINDS = 500
"""Messages that are told apart; of a log that holds more, the tracebacks that are not known count as one."""

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


def match(text: str) -> tuple[Message, dict[str, str]] | None:
    """The first known message in a line, with what its names matched."""
    for position in sorted({position for key, position in _POSITIONS if key in text}):
        if found := MESSAGES[position].regex.search(text):
            groups = {k: show(v.strip("'\"")) for k, v in found.groupdict().items() if v is not None}
            return MESSAGES[position], groups
    return None


def read(blocks: Iterable[bytes], *, live: bool = False) -> Iterator[tuple[Seen, bool]]:
    """Every message found, as it is found: with True where it is new, False where it only came again.

    A traceback that ends in none of them is given as what it is, one for each exception and place.

    Args:
        live: more may come at any time, so that a traceback is answered with its last line.
    """
    seen: dict[str, Seen] = {}
    follow, tracebacks = Follow(), Tracebacks(live=live)
    for number, line, may_hold_a_key in candidates(blocks, Keys(_KEYS), follow):
        text = line.decode("utf-8", "replace")
        text = _ANSI.sub("", text) if "\x1b" in text else text
        found = match(text) if may_hold_a_key and not (follow.on and tracebacks.is_source(text)) else None
        if found is not None and not _waits(found[0], tracebacks):
            message, groups = found
            yield _noted(seen, message.code, Seen(message, number, show(_around(text, message), 160), groups))
        explains = found is not None and crashes.explains(found[0])
        for ended in tracebacks.read(number, text, is_known=explains) if follow.on or _concerns(text) else ():
            yield from _crash(seen, ended)
        follow.on = tracebacks.is_open
    for ended in tracebacks.rest():
        yield from _crash(seen, ended)


def unknown_error(text: str) -> Seen | None:
    """An error without its traceback, as it is pasted, that is not known; None where the text is not an error."""
    lines = [line for line in text.splitlines() if line.strip()]
    name = name_of_error(lines[-1]) if lines else None
    if name is None:
        return None
    message, groups = crashes.of(Ended(name, len(lines), lines[-1], (), is_known=False))
    return Seen(message, len(lines), show(lines[-1], 160), groups)


def _waits(message: Message, tracebacks: Tracebacks) -> bool:
    """True for a message that is given with the end of its traceback, which says more."""
    if message is crashes.WORKER_FAILED:
        return tracebacks.is_open
    return message is crashes.UNKNOWN or (message.code == "worker-ended" and tracebacks.has_table)


def _concerns(text: str) -> bool:
    return HEAD in text or "Exception ignored" in text


def _noted(seen: dict[str, Seen], key: str, new: Seen) -> tuple[Seen, bool]:
    if key in seen:
        seen[key].count += 1
        return seen[key], False
    seen[key] = new
    return new, True


def _crash(seen: dict[str, Seen], ended: Ended) -> Iterator[tuple[Seen, bool]]:
    message, groups = crashes.of(ended)
    if ended.is_ignored or (ended.is_known and message.code != crashes.WORKER_FAILED.code):
        return
    key = f"{message.code} {ended.exception} {groups.get('place', '')}"
    if key not in seen and len(seen) > _MOST_KINDS:
        key = message.code
    groups = {name: show(value, 300) for name, value in groups.items()}
    yield _noted(seen, key, Seen(message, ended.line, show(ended.example.strip(), 160), groups))


def _around(text: str, message: Message) -> str:
    """The text from its beginning, or from shortly before the message where that is far in."""
    found = message.regex.search(text)
    start = found.start() if found is not None and found.start() > 100 else 0
    return text[start:].strip()
