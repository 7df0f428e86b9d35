"""Which converter a recipe's step names."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, ClassVar, Protocol, cast, runtime_checkable

from converter.diagnostic import Command
from converter.errors import UsageError
from converter.plugins import CONVERTERS, load, named, package
from converter.text import nearest, show

if TYPE_CHECKING:
    from converter.core.checkpoint import Checkpoint
    from converter.core.context import Context


@runtime_checkable
class Converter(Protocol):
    """A frozen dataclass; its fields are its recipe keys. Pure: it moves no tensor bytes."""

    name: ClassVar[str]

    def __call__(self, checkpoint: Checkpoint, context: Context) -> Checkpoint:
        """The converted checkpoint."""


@cache
def find_converter(name: str) -> type[Converter]:
    """The converter registered under `name`.

    Raises:
        UsageError: unknown, registered twice, or it can't be imported (`unknown-converter`, `plug-in`).
    """
    known = named(CONVERTERS)
    if name not in known:
        near = nearest(name, known)
        raise UsageError(
            "unknown-converter",
            f"no converter is named `{show(name)}`",
            expected=", ".join(sorted(known)) or "an installed plug-in",
            next=f"did you mean `{near[0]}`?" if near else Command("list"),
        )
    points = known[name]
    if len({p.value for p in points}) > 1:
        owners = ", ".join(sorted(package(p) for p in points))
        raise UsageError("plug-in", f"several packages register the converter `{name}`", got=owners)
    loaded = load(points[0])
    if isinstance(loaded, Exception):
        raise UsageError(
            "plug-in", f"the converter `{name}` can't be imported: {show(loaded)}", where=package(points[0])
        )
    if not (isinstance(loaded, type) and getattr(loaded, "name", None) == name):
        raise UsageError(
            "plug-in", f"{show(points[0].value)} is not a converter named `{name}`", where=package(points[0])
        )
    return cast("type[Converter]", loaded)
