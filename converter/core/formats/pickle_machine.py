"""A symbolic pickle machine: it reads what a pickle says and does nothing that it says.

Opcodes are decoded by the standard library's `pickletools`; nothing is imported, called or instantiated. What a stream
would build becomes numbers, strings, containers and three inert records. So there is nothing to poison, and an unknown
class is data like any other; whether its name is acceptable is a separate verdict, `check_names`.

Bounds: 256 MB and 10 million opcodes a pickle, integers of 128 bits, keys that are scalars or flat tuples (hashing
nested tuples recurses on the C stack and kills the process), lines of 64 KB.
"""

from __future__ import annotations

import functools
import gc
import io
import pickletools
import re
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import IO, Any, NoReturn, cast

from converter.core.formats.pickle_bytes import decode
from converter.core.formats.pickle_names import KNOWN_NAMES, MAX_NAMES, AllowedNames, allowed_names, runs_code
from converter.core.formats.pickle_values import Built, FrozenItems, Global, Ordered, Persistent, SetItems
from converter.diagnostic import Again, Steps
from converter.errors import Refused
from converter.text import fold, show

MAX_PICKLE_BYTES = 256_000_000
MAX_OPCODES = 10_000_000
"""A hundred thousand tensors take as many; more would keep a reader busy for minutes."""
MAX_INTEGER_BITS = 128
MAX_LINE = 65_536
MAX_NAME = 512


class _Mark:
    """The stack's mark."""


_MARK = _Mark()


@dataclass(frozen=True)
class PickleValue:
    """What a pickle holds: its value and every name that it mentions, used or not."""

    value: Any
    names: frozenset[str]


def read_pickle(file: Any, *, where: str) -> PickleValue:
    """Read one pickle from a binary file object, up to its STOP.

    Args:
        file: has `read(n)` and `readline()`; neither may return more than is there.
        where: the file's name, for messages.

    Raises:
        Refused: malformed, beyond a bound, or built with opcodes that only an attack uses (`pickle-malformed`).
    """
    # A pickle makes no cycles that are worth looking for while it grows; looking takes a fifth of the time.
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        if isinstance(file, io.BytesIO):
            return _Machine(where).run_bytes(file)
        return _Machine(where).run(_Bounded(file, where))
    finally:
        if was_enabled:
            gc.enable()


class _Bounded:
    """A file that gives out at most `MAX_PICKLE_BYTES`, and no endless line."""

    def __init__(self, file: Any, where: str) -> None:
        self._file = file
        self._left = MAX_PICKLE_BYTES
        self._where = where

    def read(self, count: int = -1) -> bytes:
        if count < 0 or count > self._left:
            raise _bad(self._where, f"it is larger than {MAX_PICKLE_BYTES} bytes, or a length in it is")
        data: bytes = self._file.read(count)
        self._left -= len(data)
        return data

    def readline(self) -> bytes:
        data: bytes = self._file.readline(MAX_LINE)
        self._left -= len(data)
        if not data.endswith(b"\n"):
            raise _bad(self._where, "a line in it does not end")
        return data


def _bad(where: str, why: str) -> Refused:
    return Refused("pickle-malformed", f"the pickled data can't be read: {why}", where=show(where))


# A warning: pickletools decodes escapes of old strings, and Python may be told to raise what it warns of.
_MALFORMED = (
    ValueError, IndexError, KeyError, TypeError, OverflowError, AttributeError, UnicodeError, Warning, struct.error,
)  # fmt: skip


class _Machine:
    def __init__(self, where: str) -> None:
        self.where = where
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.names: set[str] = set()

    def run_bytes(self, file: io.BytesIO) -> PickleValue:
        """The pickle that a buffer begins with."""
        raw = file.getvalue()
        if len(raw) > MAX_PICKLE_BYTES:
            raise _bad(self.where, f"it is larger than {MAX_PICKLE_BYTES} bytes, or a length in it is")
        try:
            decode(raw, self.stack, self.memo, _MARK, self.does, MAX_OPCODES)
            return PickleValue(self.pop(), frozenset(self.names))
        except Refused:
            raise
        except _MALFORMED as error:
            raise self.malformed(error) from error

    def malformed(self, error: Exception) -> Refused:
        what = "it refers to something that is not there" if isinstance(error, LookupError) else show(error)
        return _bad(self.where, what)

    def run(self, file: _Bounded) -> PickleValue:
        try:
            for count, (opcode, argument, _) in enumerate(pickletools.genops(cast("IO[bytes]", file))):
                if count > MAX_OPCODES:
                    self.fail("too many opcodes")
                if opcode.name == "STOP":
                    return PickleValue(self.pop(), frozenset(self.names))
                self.step(opcode.name, argument)
        except Refused:
            raise
        except _MALFORMED as error:
            raise self.malformed(error) from error
        raise _bad(self.where, "it has no end")

    def fail(self, why: str) -> NoReturn:
        raise _bad(self.where, why)

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            self.fail("a value is missing")
        return value

    def top(self, kind: type | tuple[type, ...]) -> Any:
        if not isinstance(self.stack[-1], kind):
            self.fail("it adds to something that is not a container")
        return self.stack[-1]

    def to_mark(self) -> list[Any]:
        stack = self.stack
        for at in range(len(stack) - 1, -1, -1):
            if stack[at] is _MARK:
                items = stack[at + 1 :]
                del stack[at:]
                return items
        raise _bad(self.where, "a mark is missing")

    def step(self, name: str, argument: Any) -> None:
        self.does(name)(argument)

    def does(self, name: str) -> Callable[[Any], Any]:
        """What an opcode does, given its argument."""
        if name in _LITERALS:
            return self.push_literal
        if name in _CONSTANTS:
            made = _CONSTANTS[name]
            return lambda _: self.stack.append(made())
        if name in _ACTIONS:
            return functools.partial(_ACTIONS[name], self)
        if name in _IGNORED:
            return lambda _: None
        raise _bad(self.where, f"the opcode {name} has no place in a checkpoint")

    def push_literal(self, value: Any) -> None:
        if isinstance(value, int) and value.bit_length() > MAX_INTEGER_BITS:
            self.fail("a number is too large")
        self.stack.append(value)

    def push_global(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str) or len(module) + len(name) > MAX_NAME:
            self.fail("a name in it is not a name")
        self.names.add(f"{module}.{name}")
        self.stack.append(Global(module, name))

    def call(self, function: Any, args: Any, kwargs: Any = None, *, is_new: bool = False) -> None:
        if not isinstance(args, tuple):
            self.fail("a call's arguments are no tuple")
        is_container = isinstance(function, Global) and function.name in _CONTAINERS and not args and not kwargs
        made = _CONTAINERS[function.name].get(function.module) if is_container else None
        self.stack.append(Built(function, args, kwargs, is_new=is_new) if made is None else made())

    def fill(self, target: Built, how: str, items: list[Any]) -> None:
        if items and target.filled not in ("", how):
            self.fail("it fills an object in two ways")
        target.filled = how if items else target.filled
        target.items += items

    def set_items(self, target: Any, items: list[Any]) -> None:
        if len(items) % 2:
            self.fail("a key has no value")
        pairs = zip(items[::2], items[1::2], strict=True)
        if isinstance(target, Built):
            self.fill(target, "set", list(pairs))
            return
        for key, value in pairs:
            if type(key) is not str and not _is_key(key):
                self.fail("a key is neither a scalar nor a flat tuple")
            target[key] = value

    def append_items(self, target: Any, items: list[Any]) -> None:
        if isinstance(target, Built):
            self.fill(target, "append", items)
        else:
            target.extend(items)

    def add_items(self, target: Any, items: list[Any]) -> None:
        if isinstance(target, Built):
            self.fill(target, "add", items)
        else:
            target.extend(items)

    def build(self) -> None:
        state = self.pop()
        target = self.stack[-1]
        if isinstance(target, dict):
            if not isinstance(state, dict | None):
                self.fail("a dictionary gets a state that is none")
            if isinstance(target, Ordered):
                target.state = state
            return
        if not isinstance(target, Built):
            self.fail("it sets the state of something that has none")
        target.state = state

    def store(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def stack_global(self) -> None:
        name, module = self.pop(), self.pop()
        self.push_global(module, name)

    def reduce(self, *, is_new: bool = False) -> None:
        args, function = self.pop(), self.pop()
        self.call(function, args, is_new=is_new)

    def new_with_keywords(self) -> None:
        kwargs, args, function = self.pop(), self.pop(), self.pop()
        self.call(function, args, kwargs, is_new=True)

    def instance(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        args = tuple(self.to_mark())
        self.push_global(module, name)
        self.call(self.pop(), args)

    def old_object(self) -> None:
        function, *args = self.to_mark()
        self.call(function, tuple(args))

    def append(self) -> None:
        item = self.pop()
        self.append_items(self.top((list, Built)), [item])

    def set_item(self) -> None:
        value, key = self.pop(), self.pop()
        self.set_items(self.top((dict, Built)), [key, value])

    def many(self, kinds: tuple[type, ...], add: Callable[[Any, list[Any]], None]) -> None:
        items = self.to_mark()
        add(self.top(kinds), items)

    def tuple_of(self, count: int) -> None:
        if len(self.stack) < count:
            raise IndexError("pop from an empty stack")
        items = tuple(self.stack[-count:])
        if _MARK in items:
            self.fail("a value is missing")
        self.stack[-count:] = (items,)


_CONTAINERS: dict[str, dict[str, Callable[[], Any]]] = {
    "OrderedDict": {"collections": Ordered},
    "dict": {"builtins": dict, "__builtin__": dict},
}
"""What becomes a container rather than a record of a call: by name, then by module."""


def _is_key(key: Any) -> bool:
    if isinstance(key, tuple):
        return len(key) <= 64 and not any(isinstance(k, tuple | list | dict) for k in key)
    return not isinstance(key, list | dict)


def _dict_of(machine: _Machine, items: list[Any]) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    machine.set_items(found, items)
    return found


def _split_global(machine: _Machine, argument: str) -> None:
    module, _, name = argument.partition(" ")
    machine.push_global(module, name)


_LITERALS = frozenset(
    {
        "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
        "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES",
        "BINBYTES8", "BYTEARRAY8",
    }
)  # fmt: skip

_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_SET": SetItems,
    "EMPTY_DICT": dict,
    "EMPTY_TUPLE": tuple,
    "MARK": lambda: _MARK,
}

_IGNORED = frozenset({"PROTO", "FRAME"})

_ACTIONS: dict[str, Callable[[_Machine, Any], Any]] = {
    "POP": lambda m, a: m.stack.pop(),
    "POP_MARK": lambda m, a: m.to_mark(),
    "DUP": lambda m, a: m.stack.append(m.stack[-1]),
    "APPEND": lambda m, a: m.append(),
    "APPENDS": lambda m, a: m.many((list, Built), m.append_items),
    "ADDITEMS": lambda m, a: m.many((list, Built), m.add_items),
    "LIST": lambda m, a: m.stack.append(m.to_mark()),
    "FROZENSET": lambda m, a: m.stack.append(FrozenItems(m.to_mark())),
    "TUPLE": lambda m, a: m.stack.append(tuple(m.to_mark())),
    "TUPLE1": lambda m, a: m.tuple_of(1),
    "TUPLE2": lambda m, a: m.tuple_of(2),
    "TUPLE3": lambda m, a: m.tuple_of(3),
    "DICT": lambda m, a: m.stack.append(_dict_of(m, m.to_mark())),
    "SETITEM": lambda m, a: m.set_item(),
    "SETITEMS": lambda m, a: m.many((dict, Built), m.set_items),
    "GET": lambda m, a: m.stack.append(m.memo[a]),
    "BINGET": lambda m, a: m.stack.append(m.memo[a]),
    "LONG_BINGET": lambda m, a: m.stack.append(m.memo[a]),
    "PUT": lambda m, a: m.store(a),
    "BINPUT": lambda m, a: m.store(a),
    "LONG_BINPUT": lambda m, a: m.store(a),
    "MEMOIZE": lambda m, a: m.store(len(m.memo)),
    "GLOBAL": _split_global,
    "STACK_GLOBAL": lambda m, a: m.stack_global(),
    "REDUCE": lambda m, a: m.reduce(),
    "NEWOBJ": lambda m, a: m.reduce(is_new=True),
    "NEWOBJ_EX": lambda m, a: m.new_with_keywords(),
    "INST": lambda m, a: m.instance(a),
    "OBJ": lambda m, a: m.old_object(),
    "BUILD": lambda m, a: m.build(),
    "PERSID": lambda m, a: m.stack.append(Persistent(a)),
    "BINPERSID": lambda m, a: m.stack.append(Persistent(m.pop())),
}


def check_names(names: Iterable[str], *, where: str, allow: re.Pattern[str] | None = None) -> None:
    """Refuse a file that mentions names which no checkpoint needs, though nothing in it can run here.

    Args:
        allow: names of the user's own trainer, matched whole; None: what `allowing_names` says.

    Raises:
        Refused: names them (`pickle-names`).
    """
    unknown = sorted(n for n in names if not KNOWN_NAMES.fullmatch(n))
    allowed = allowed_names() if allow is None else AllowedNames(allow)
    if allowed is not None and len(unknown) <= MAX_NAMES:
        unknown = [n for n in unknown if not allowed.allows(n)]
    if unknown:
        is_attack = any(map(runs_code, unknown)) or len(unknown) > MAX_NAMES
        pattern = "|".join(map(re.escape, unknown[:3]))
        raise Refused(
            "pickle-names",
            f"the file names code that a checkpoint does not need: {fold(unknown)}. Nothing of it was run",
            where=show(where),
            next="don't load it with anything; ask whoever made it for safetensors"
            if is_attack
            else Steps("if your own trainer wrote it: ", Again(("--allow-name", pattern)), "; it is read as data only"),
        )
