"""A pickle stream of what `pickle_machine` read: opcodes as CPython's pickler writes them, in protocol 2.

Objects that were one object are one again, and what isn't there before (a container of a newer protocol) is written
with that protocol's opcode, which unpicklers take whatever the header says. A tree that was read and not changed gives
the bytes that it was read from, where torch.save wrote them.

Sources: https://docs.python.org/3/library/pickletools.html, CPython's Modules/_pickle.c (what gets a number, batches).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

from converter.core.formats.pickle_values import Built, FrozenItems, Global, Ordered, Persistent, SetItems
from converter.errors import Refused

MAX_DEPTH = 128

_BATCH = 1000
"""Items that the C pickler adds with one opcode. Source: `BATCHSIZE` in CPython's Modules/_pickle.c."""


def write_pickle(value: Any, *, reference: Callable[[Any], Any]) -> bytes:
    """The stream that builds `value`.

    Args:
        reference: what to write as the identity of a persistent object, given the one it has in the tree.

    Raises:
        Refused: nested too deeply, or in itself (`pickle-malformed`).
    """
    made = _Pickler(reference)
    made.save(value, 0)
    return bytes(made.out + b".")


class _Pickler:
    """Objects are numbered as they are written, and referred to by number when they come again."""

    def __init__(self, reference: Callable[[Any], Any]) -> None:
        self.out = bytearray(b"\x80\x02")
        self._reference = reference
        self._numbers: dict[Any, int] = {}
        self._kept: list[Any] = []

    def save(self, value: Any, depth: int) -> None:
        """Write one value."""
        if depth > MAX_DEPTH:
            raise Refused("pickle-malformed", f"values are nested deeper than {MAX_DEPTH}")
        if self._plain(value):
            return
        if self._again(value):
            return
        match value:
            case str() | bytes() | bytearray():
                self._text(value)
            case Global():
                self.out += f"c{value.module}\n{value.name}\n".encode()
                self._note(value)
            case Persistent():
                self.save(self._reference(value.identity), depth + 1)
                self.out += b"Q"
            case tuple():
                self._tuple(value, depth)
            case SetItems():
                self._open(b"\x8f", value)
                self._items(value, b"\x90", None, depth)
            case FrozenItems():
                self._marked(value, b"\x91", depth)
                self._note(value)
            case list():
                self._open(b"]", value)
                self._items(value, b"e", b"a" if len(value) == 1 else None, depth)
            case Ordered():
                self.save(Global("collections", "OrderedDict"), depth + 1)
                self._open(b")R", value)
                self._pairs(list(value.items()), depth)
                self._state(value.state, depth)
            case dict():
                self._open(b"}", value)
                self._pairs(list(value.items()), depth, is_plain=True)
            case Built():
                self._built(value, depth)
            case _:
                raise Refused("pickle-malformed", f"a {type(value).__name__} has no place in a checkpoint")

    def _again(self, value: Any) -> bool:
        """Refer to an object that was written; False where it wasn't."""
        number = self._numbers.get(value if isinstance(value, Global) else id(value))
        if number is not None:
            self.out += struct.pack("<cB", b"h", number) if number < 256 else struct.pack("<cI", b"j", number)
        return number is not None

    def _note(self, value: Any) -> None:
        """Give the object on the stack its number."""
        number = len(self._kept)
        self._kept.append(value)  # an object that lives keeps its identity
        self._numbers[value if isinstance(value, Global) else id(value)] = number
        self.out += struct.pack("<cB", b"q", number) if number < 256 else struct.pack("<cI", b"r", number)

    def _open(self, opcode: bytes, value: Any) -> None:
        self.out += opcode
        self._note(value)

    def _plain(self, value: Any) -> bool:
        """Write what gets no number; False for everything else."""
        match value:
            case None:
                self.out += b"N"
            case bool():
                self.out += b"\x88" if value else b"\x89"
            case int():
                self._integer(value)
            case float():
                self.out += b"G" + struct.pack(">d", value)
            case tuple() if not value:
                self.out += b")"
            case _:
                return False
        return True

    def _integer(self, value: int) -> None:
        if 0 <= value < 1 << 8:
            self.out += struct.pack("<cB", b"K", value)
        elif 0 <= value < 1 << 16:
            self.out += struct.pack("<cH", b"M", value)
        elif -(1 << 31) <= value < 1 << 31:
            self.out += struct.pack("<ci", b"J", value)
        else:
            raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
            if value < 0 and raw[-1] == 0xFF and raw[-2] & 0x80:
                raw = raw[:-1]
            self.out += struct.pack("<cB", b"\x8a", len(raw)) + raw

    def _text(self, value: str | bytes | bytearray) -> None:
        if isinstance(value, str):
            raw = value.encode(errors="surrogatepass")
            self.out += struct.pack("<cI", b"X", len(raw)) + raw
        elif isinstance(value, bytearray):
            self.out += struct.pack("<cQ", b"\x96", len(value)) + value
        elif len(value) < 256:
            self.out += struct.pack("<cB", b"C", len(value)) + value
        else:
            self.out += struct.pack("<cI", b"B", len(value)) + value
        self._note(value)

    def _tuple(self, value: tuple[Any, ...], depth: int) -> None:
        is_long = len(value) > 3
        self._marked(value, b"", depth, mark=b"(" if is_long else b"")
        if id(value) in self._numbers:  # something in it refers to it: it is there already
            self.out += b"1" if is_long else b"0" * len(value)
            self._again(value)
            return
        self.out += b"t" if is_long else (b"\x85", b"\x86", b"\x87")[len(value) - 1]
        self._note(value)

    def _marked(self, items: Sequence[Any], opcode: bytes, depth: int, *, mark: bytes = b"(") -> None:
        self.out += mark
        for item in items:
            self.save(item, depth + 1)
        self.out += opcode

    def _items(self, items: Sequence[Any], many: bytes, one: bytes | None, depth: int) -> None:
        """Items in batches; `one` is the opcode of a single one, where that has its own."""
        if one is not None:
            self.save(items[0], depth + 1)
            self.out += one
            return
        for batch in _batches(items):
            self._marked(batch, many, depth)

    def _pairs(self, pairs: Sequence[tuple[Any, Any]], depth: int, *, is_plain: bool = False) -> None:
        """Keys and values in batches; of a dict, only a single pair has its own opcode, else also one left over."""
        for batch in _batches(pairs):
            flat = list(chain.from_iterable(batch))
            if len(batch) == 1 and (not is_plain or len(pairs) == 1):
                for item in flat:
                    self.save(item, depth + 1)
                self.out += b"s"
            else:
                self._marked(flat, b"u", depth)

    def _built(self, value: Built, depth: int) -> None:
        self.save(value.function, depth + 1)
        self.save(value.args, depth + 1)
        if value.kwargs is not None:
            self.save(value.kwargs, depth + 1)
            self._open(b"\x92", value)
        else:
            self._open(b"\x81" if value.is_new else b"R", value)
        if value.filled == "set":
            self._pairs(value.items, depth)
        elif value.filled == "add":
            self._items(value.items, b"\x90", None, depth)
        elif value.items:
            for batch in _batches(value.items):
                self._items(batch, b"e", b"a" if len(batch) == 1 else None, depth)
        self._state(value.state, depth)

    def _state(self, state: Any, depth: int) -> None:
        if state is not None:
            self.save(state, depth + 1)
            self.out += b"b"


def _batches(items: Sequence[Any]) -> list[Sequence[Any]]:
    """Stretches of at most as many items as one opcode adds."""
    return [items[start : start + _BATCH] for start in range(0, len(items), _BATCH)]
