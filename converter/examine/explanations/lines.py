"""The few lines of a log that are worth a look, at some hundred megabytes a second.

A training log says the same things over and over with other numbers. Lines are compared without their digits: what was
seen once and holds no key is not searched again.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

MAX_LINE = 20_000
"""Characters of one line that are looked at; a progress bar without newlines can make lines of megabytes."""

OVERLAP = 2_000
"""Characters that two pieces of an overlong line share."""

_DIGITS = b"0123456789"
_REMEMBERED = 100_000
_REMEMBERED_LENGTH = 400
"""Lines without a key that are remembered, and how long one may be: some 40 MB at most."""


@dataclass
class Follow:
    """Whether every line is wanted, as after the head of a traceback; whoever reads the lines switches it."""

    on: bool = False


class Line(NamedTuple):
    """A line that is worth a look.

    Attributes:
        number: as editors count, from 1.
        may_hold_a_key: False for a line that is only followed.
    """

    number: int
    text: bytes
    may_hold_a_key: bool


class Keys:
    """What a line must hold one of."""

    def __init__(self, keys: Iterable[bytes]) -> None:
        held = frozenset(keys)
        self._exact = _shortest(held)
        self._without_digits = _shortest(frozenset(key.translate(None, _DIGITS) for key in held))
        self._cold: set[bytes] = set()

    def in_text(self, data: bytes) -> re.Pattern[bytes] | None:
        """A search for the keys that a text holds; None where it holds none."""
        # Few keys are in a block, and to ask for each is many times faster than one search for all.
        present = tuple(key for key in self._exact if key in data)
        return _any_of(present) if present else None

    def hot(self, stripped: Sequence[bytes]) -> set[bytes]:
        """Of lines without digits those that may hold a key."""
        fresh = set(stripped) - self._cold
        joined = b"\n".join(fresh)
        hot = {line for key in self._without_digits for line in _lines_with(key, joined)}
        if len(self._cold) + len(fresh) > _REMEMBERED:
            self._cold.clear()
        self._cold.update(line for line in fresh if len(line) <= _REMEMBERED_LENGTH and line not in hot)
        return hot


def _lines_with(key: bytes, data: bytes) -> Iterator[bytes]:
    at = data.find(key)
    while at >= 0:
        end = data.find(b"\n", at)
        end = len(data) if end < 0 else end
        yield data[data.rfind(b"\n", 0, at) + 1 : end]
        at = data.find(key, end)


@lru_cache(maxsize=8)
def _shortest(keys: frozenset[bytes]) -> tuple[bytes, ...]:
    """The keys that hold no other: a line with one of the others has one of these."""
    joined = b"\n".join(keys)
    longer = {line for key in keys for line in _lines_with(key, joined) if line != key}
    return tuple(sorted(keys - longer))


@lru_cache(maxsize=64)
def _any_of(keys: tuple[bytes, ...]) -> re.Pattern[bytes]:
    return re.compile(b"|".join(map(re.escape, keys)))


def candidates(blocks: Iterable[bytes], keys: Keys, follow: Follow) -> Iterator[Line]:
    """Lines that hold a key, with their numbers as editors count them; of an overlong line the key's surroundings.

    A carriage return ends a line too (progress bars), without counting.
    """
    rest, number = b"", 1
    for block in _as_utf8(blocks):
        data = rest + block
        end = max(data.rfind(b"\n"), data.rfind(b"\r")) + 1
        is_overlong = len(data) - end > MAX_LINE
        end = len(data) if is_overlong else end
        yield from _found(data[:end], number, keys, follow)
        number += data.count(b"\n", 0, end)
        rest = data[-OVERLAP:] if is_overlong else data[end:]
    yield from _found(rest, number, keys, follow)


def _as_utf8(blocks: Iterable[bytes]) -> Iterator[bytes]:
    decoder = None
    for number, block in enumerate(blocks):
        if number == 0 and block[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            decoder = codecs.getincrementaldecoder("utf-16")("replace")
        yield block if decoder is None else decoder.decode(block).encode("utf-8", "replace")


def _found(data: bytes, number: int, keys: Keys, follow: Follow) -> Iterator[Line]:
    lines = data.replace(b"\r", b"\n").split(b"\n")
    stripped = [line.translate(None, _DIGITS) for line in lines] if len(lines) < 2 else _stripped(data)
    hot = keys.hot(stripped)
    if not hot and not follow.on:
        return
    starts = [0, *accumulate(len(line) + 1 for line in lines)]
    counted = at = 0
    while at < len(lines):
        is_hot = stripped[at] in hot
        if not follow.on and not is_hot:
            at += 1
            continue
        number += data.count(b"\n", counted, starts[at])
        counted = starts[at]
        if len(lines[at]) <= MAX_LINE:
            yield Line(number, lines[at], is_hot)
        else:
            yield from (Line(number, piece, is_hot) for piece in _around_keys(lines[at], keys))
        at += 1


def _stripped(data: bytes) -> list[bytes]:
    return data.translate(None, _DIGITS).replace(b"\r", b"\n").split(b"\n")


def _around_keys(line: bytes, keys: Keys) -> Iterator[bytes]:
    search = keys.in_text(line)
    at = 0
    while search is not None and (hit := search.search(line, at)) is not None:
        start = max(at, hit.start() - OVERLAP)
        at = max(min(len(line), start + MAX_LINE), hit.end())
        yield line[start:at]
