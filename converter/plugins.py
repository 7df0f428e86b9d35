"""Finds plug-ins by entry point, ours as a stranger's; nothing is imported before it is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from converter.text import show

SOURCES = "rlhf_convert.sources"
CONVERTERS = "rlhf_convert.converters"
KERNELS = "rlhf_convert.kernels"
DIAGNOSES = "rlhf_convert.diagnoses"
DIALECTS = "rlhf_convert.dialects"
METHODS = "rlhf_convert.methods"
GROUPS = (SOURCES, CONVERTERS, METHODS, KERNELS, DIAGNOSES, DIALECTS)


@dataclass(frozen=True)
class PlugIn:
    """One registered name: what kind it is, where it comes from and what is wrong with it, if anything."""

    group: str
    name: str
    target: str
    package: str
    fault: str | None = None

    @property
    def kind(self) -> str:
        """`source`, `converter`, `method`, `kernel`, `diagnose` (as release 0.1.0 says in JSON) or `dialect`."""
        name = self.group.rpartition(".")[2]
        return name.removesuffix("s")


def plug_ins(groups: Sequence[str] = GROUPS) -> list[PlugIn]:
    """Everything registered, ours and strangers', each imported to see whether it works."""
    found: list[PlugIn] = []
    for group in groups:
        for name, points in sorted(named(group).items()):
            for point in points:
                loaded = load(point)
                fault = show(loaded) if isinstance(loaded, Exception) else None
                if fault is None and len({p.value for p in points}) > 1:
                    fault = "registered twice"
                found.append(PlugIn(group, name, point.value, package(point), fault))
    return found


def loaded(group: str) -> list[Any]:
    """What every entry point of a group names, those that can't be imported left out."""
    values = [load(points[0]) for _, points in sorted(named(group).items())]
    return [v for v in values if not isinstance(v, Exception)]


def named(group: str) -> dict[str, list[EntryPoint]]:
    """Entry points by name. An editable install beside a wheel lists one point twice; that is one plug-in."""
    found: dict[str, list[EntryPoint]] = {}
    for point in entry_points(group=group):
        same = found.setdefault(point.name, [])
        if point.value not in {p.value for p in same}:
            same.append(point)
    return found


def load(point: EntryPoint) -> Any:
    """What the entry point names, or the exception that importing it raised: a broken stranger must not stop us."""
    try:
        return point.load()
    except Exception as error:
        return error


def package(point: EntryPoint) -> str:
    """Name and version of the package that registers an entry point."""
    return "unknown package" if point.dist is None else f"{point.dist.name} {point.dist.version}"
