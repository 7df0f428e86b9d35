"""What a pickle builds, as inert values: names, references, calls, and containers that know what they were.

`converter.core.formats.pickle_machine` makes them of a stream, `converter.core.formats.pickle_writer` makes a stream of
them; nothing is lost on the way, so that a tree which was read, changed in places and written again is what its loader
expects. Dictionaries and lists are Python's own, or subclasses where the stream made another container.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Global:
    """A name that the stream would import."""

    module: str
    name: str

    @property
    def path(self) -> str:
        """`module.name`."""
        return f"{self.module}.{self.name}"


@dataclass(frozen=True, slots=True, eq=False)
class Persistent:
    """A reference that the container resolves: in torch's files, a storage."""

    identity: Any


class Built:
    """What a call would make: the callable, its arguments, and what was then set or added. Compared by identity.

    Attributes:
        is_new: `cls.__new__(cls, *args)` and not `function(*args)`.
        filled: how `items` come into it: `set` (pairs), `append` or `add`; empty where there are none.
    """

    __slots__ = ("args", "filled", "function", "is_new", "items", "kwargs", "state")

    def __init__(self, function: Any, args: tuple[Any, ...], kwargs: Any = None, *, is_new: bool = False) -> None:
        self.function = function
        self.args = args
        self.kwargs = kwargs
        self.is_new = is_new
        self.state: Any = None
        self.items: list[Any] = []
        self.filled = ""

    @property
    def path(self) -> str:
        """The callable's dotted name; empty where it is not a name."""
        return self.function.path if isinstance(self.function, Global) else ""


class Ordered(dict[Any, Any]):
    """An OrderedDict, and what was set on it (a module's `_metadata`)."""

    state: Any = None


class SetItems(list[Any]):
    """A set's elements."""


class FrozenItems(list[Any]):
    """A frozenset's elements."""
