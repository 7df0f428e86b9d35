"""The few lines of a log that are worth a look, at some hundred megabytes a second.

A training log says the same things over and over with other numbers: lines are compared without their digits, and what
was seen once and holds no key is not searched again. Where lines do not repeat, as in printed answers of a model, they
are searched as they are. Few keys are in a block, and none can be in it whose bytes at a multiple of four are not: so a
block is read as numbers of eight bytes, and searched for the keys that may be in it only.
"""

from __future__ import annotations

import codecs
import re
import sys
from bisect import bisect_left
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

_MOST_FRESH = 0.6
_NOT_COMPARED = 15
"""Of a block with a greater share of lines that were not seen before, the next ones are not compared with them."""

_NUMBER = 8
_STEP = 4
_SHORTEST = _NUMBER + _STEP - 1
"""A key this long holds, wherever it begins, eight bytes that begin at a multiple of four."""


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
        self._exact = _table(held)
        self._without_digits = _table(frozenset(key.translate(None, _DIGITS) for key in held))
        self._cold: set[bytes] = set()
        self._blocks_as_they_are = 0

    def in_text(self, data: bytes) -> re.Pattern[bytes] | None:
        """A search for the keys that a text holds; None where it holds none."""
        present = tuple(key for key in self._exact.possible(data) if key in data)
        return _any_of(present) if present else None

    def starts(self, data: bytes) -> list[int]:
        """Where the lines begin that may hold a key, in order."""
        if self._blocks_as_they_are:
            self._blocks_as_they_are -= 1
            return sorted(self._exact.starts(data))
        stripped = data.translate(None, _DIGITS).split(b"\n")
        hot = self._hot(stripped)
        if not hot:
            return []
        starts = accumulate((len(line) + 1 for line in data.split(b"\n")), initial=0)
        return [start for start, line in zip(starts, stripped, strict=False) if line in hot]

    def _hot(self, stripped: Sequence[bytes]) -> set[bytes]:
        """Of lines without digits those that may hold a key."""
        fresh = set(stripped) - self._cold
        joined = b"\n".join(fresh)
        hot = {joined[at : _end(joined, at)] for at in self._without_digits.starts(joined)}
        if len(joined) > _MOST_FRESH * (sum(map(len, stripped)) + len(stripped)):
            self._blocks_as_they_are = _NOT_COMPARED
        if len(self._cold) + len(fresh) > _REMEMBERED:
            self._cold.clear()
        self._cold.update(line for line in fresh if len(line) <= _REMEMBERED_LENGTH and line not in hot)
        return hot


class _Table:
    """Keys by eight of their bytes."""

    def __init__(self, keys: Iterable[bytes]) -> None:
        held = _shortest(frozenset(keys))
        self._short = tuple(key for key in held if len(key) < _SHORTEST)
        self._of_number: dict[int, set[bytes]] = {}
        for key in set(held).difference(self._short):
            for at in range(_STEP):
                self._of_number.setdefault(int.from_bytes(key[at : at + _NUMBER], sys.byteorder), set()).add(key)
        self._numbers = frozenset(self._of_number)

    def possible(self, data: bytes) -> list[bytes]:
        """The keys that may be in a text."""
        found = set[int]()
        for begin in range(0, _NUMBER, _STEP):
            with memoryview(data) as view:
                end = begin + max(len(data) - begin, 0) // _NUMBER * _NUMBER
                found |= self._numbers.intersection(view[begin:end].cast("Q"))
        return [*self._short, *sorted({key for number in found for key in self._of_number[number]})]

    def starts(self, data: bytes) -> set[int]:
        """Where the lines begin that hold a key."""
        return {start for key in self.possible(data) for start in _lines_with(key, data)}


@lru_cache(maxsize=8)
def _table(keys: frozenset[bytes]) -> _Table:
    return _Table(keys)


def _lines_with(key: bytes, data: bytes) -> Iterator[int]:
    at = data.find(key)
    while at >= 0:
        yield data.rfind(b"\n", 0, at) + 1
        end = data.find(b"\n", at)
        at = data.find(key, end) if end >= 0 else -1


def _end(data: bytes, at: int) -> int:
    """Where the line ends that a place is in."""
    end = data.find(b"\n", at)
    return len(data) if end < 0 else end


@lru_cache(maxsize=8)
def _shortest(keys: frozenset[bytes]) -> tuple[bytes, ...]:
    """The keys that hold no other: a line with one of the others has one of these."""
    joined = b"\n".join(keys)
    starts = {start for key in keys for start in _lines_with(key, joined) if joined[start : _end(joined, start)] != key}
    return tuple(sorted(keys - {joined[start : _end(joined, start)] for start in starts}))


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
    lines = data.replace(b"\r", b"\n")
    hot = keys.starts(lines)
    at = counted = 0
    while at < len(lines):
        which = bisect_left(hot, at)
        if not follow.on:
            if which == len(hot):
                return
            at = hot[which]
        end = _end(lines, at)
        number += data.count(b"\n", counted, at)
        counted = at
        is_hot = which < len(hot) and hot[which] == at
        if end - at <= MAX_LINE:
            yield Line(number, lines[at:end], is_hot)
        else:
            yield from (Line(number, piece, is_hot) for piece in _around_keys(lines[at:end], keys))
        at = end + 1


def _around_keys(line: bytes, keys: Keys) -> Iterator[bytes]:
    search = keys.in_text(line)
    at = 0
    while search is not None and (hit := search.search(line, at)) is not None:
        start = max(at, hit.start() - OVERLAP)
        at = max(min(len(line), start + MAX_LINE), hit.end())
        yield line[start:at]
