"""Opcodes of a pickle that is wholly in memory, decoded fast: `.metadata` of a large mixture has five million of them.

The opcodes that make up nearly all of what torch writes are decoded here; each other one by `pickletools`, which
decides alone what it means. What a value becomes is the machine's to say (`pickle_machine`).
"""

from __future__ import annotations

import io
import pickletools
from collections.abc import Callable
from struct import Struct
from typing import Any

_OPCODES = {ord(opcode.code): opcode for opcode in pickletools.opcodes}
_UINT2, _INT4, _UINT4 = Struct("<H"), Struct("<i"), Struct("<I")


Act = Callable[[Any], object]


class Cut(ValueError):
    """A pickle that ends inside an opcode, or without its end."""


def decode(
    raw: bytes,
    stack: list[Any],
    memo: dict[int, Any],
    mark: object,
    does: Callable[[str], Act],
    most: int,
) -> None:
    """Run every opcode up to STOP, which is not run.

    Args:
        does: what an opcode does that isn't done here, by its name.
        most: opcodes that there may be.

    Raises:
        ValueError: too many opcodes, an unknown one, or no end; and what the decoding of an argument raises.
    """
    file = io.BytesIO(raw)
    alone: dict[int, Act] = {}  # opcodes that were met before, without an argument, and with one
    others: dict[int, tuple[Act, Callable[[io.BytesIO], Any] | None]] = {}
    push, long = stack.append, _UINT4.unpack_from
    at, size = 0, len(raw)
    for _ in range(most + 1):
        if at >= size:
            raise Cut("it has no end")
        code = raw[at]
        at += 1
        if code == 0x94:  # MEMOIZE
            memo[len(memo)] = stack[-1]
        elif code == 0x6A:  # LONG_BINGET
            push(memo[long(raw, at)[0]])
            at += 4
        elif code == 0x68:  # BINGET
            push(memo[raw[at]])
            at += 1
        elif code == 0x4B:  # BININT1
            push(raw[at])
            at += 1
        elif (act := alone.get(code)) is not None:
            act(None)
        elif code == 0x4D:  # BININT2
            push(_UINT2.unpack_from(raw, at)[0])
            at += 2
        elif code == 0x28:  # MARK
            push(mark)
        elif code == 0x71:  # BINPUT
            memo[raw[at]] = stack[-1]
            at += 1
        elif code == 0x72:  # LONG_BINPUT
            memo[long(raw, at)[0]] = stack[-1]
            at += 4
        elif code == 0x4A:  # BININT
            push(_INT4.unpack_from(raw, at)[0])
            at += 4
        elif code == 0x8C:  # SHORT_BINUNICODE
            at = _text(raw, at + 1, raw[at], push)
        elif code == 0x58:  # BINUNICODE
            at = _text(raw, at + 4, long(raw, at)[0], push)
        elif code == 0x2E:  # STOP
            return
        else:
            act, reader = others.get(code) or _other(code, does)
            if reader is None:
                alone[code] = act
                act(None)
                continue
            others[code] = act, reader
            file.seek(at)
            act(reader(file))
            at = file.tell()
    raise ValueError("too many opcodes")


def _other(code: int, does: Callable[[str], Act]) -> tuple[Act, Callable[[io.BytesIO], Any] | None]:
    """What an opcode does that is not decoded here, and what reads its argument."""
    info = _OPCODES.get(code)
    if info is None:
        raise ValueError(f"the opcode {code:#x} is unknown")
    reader: Any = None if info.arg is None else info.arg.reader
    return does(info.name), reader


def _text(raw: bytes, start: int, length: int, push: Callable[[Any], None]) -> int:
    """Push a string; where it ends."""
    stop = start + length
    if stop > len(raw):
        raise Cut("it ends inside a string")
    push(raw[start:stop].decode("utf-8", "surrogatepass"))
    return stop
