"""Finds plug-ins by entry point, ours as a stranger's; nothing is imported before it is asked for.

`importlib.metadata` takes longer to import, and to walk over an environment, than a 70B model's headers take to read.
So the files that it would read are read here, in one walk for all groups; what only it can read is left to it.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from converter.text import show

SOURCES = "rlhf_convert.sources"
CONVERTERS = "rlhf_convert.converters"
KERNELS = "rlhf_convert.kernels"
DIAGNOSES = "rlhf_convert.diagnoses"
DIALECTS = "rlhf_convert.dialects"
METHODS = "rlhf_convert.methods"
GROUPS = (SOURCES, CONVERTERS, METHODS, KERNELS, DIAGNOSES, DIALECTS)
_OURS = "rlhf_convert."


@dataclass(frozen=True)
class Point:
    """One line of an installed package.

    Attributes:
        value: `package.module`, or `package.module:attribute`.
        home: the folder with the package's metadata, where we read it ourselves.
        owner: the package's name and version, where it is known already.
    """

    group: str
    name: str
    value: str
    home: str = ""
    owner: str = ""

    def load(self) -> Any:
        """Import what the value names; raises whatever importing raises."""
        module, _, attributes = self.value.partition("[")[0].strip().partition(":")
        found: Any = import_module(module.strip())
        for attribute in filter(None, attributes.strip().split(".")):
            found = getattr(found, attribute)
        return found


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


def plug_ins(groups: Sequence[str] = GROUPS, *, only_broken: bool = False) -> list[PlugIn]:
    """Everything registered, ours and strangers', or what of it is broken; each is imported to see whether it works."""
    found: list[PlugIn] = []
    for group in groups:
        for name, points in sorted(named(group).items()):
            for point in points:
                loaded = load(point)
                fault = (show(loaded) or type(loaded).__name__) if isinstance(loaded, Exception) else None
                if fault is None and len({p.value for p in points}) > 1:
                    fault = "registered twice"
                if only_broken and fault is None:
                    continue
                found.append(PlugIn(group, name, point.value, package(point), fault))
    return found


def loaded(group: str) -> list[Any]:
    """What every entry point of a group names, those that can't be imported left out."""
    values = [load(points[0]) for _, points in sorted(named(group).items())]
    return [v for v in values if not isinstance(v, Exception)]


def named(group: str) -> dict[str, list[Point]]:
    """Entry points by name. An editable install beside a wheel lists one point twice; that is one plug-in."""
    found: dict[str, list[Point]] = {}
    for point in _registered(tuple(sys.path)):
        if point.group == group:
            same = found.setdefault(point.name, [])
            if point.value not in {p.value for p in same}:
                same.append(point)
    return found


@lru_cache(maxsize=4)
def _registered(path: tuple[str, ...]) -> tuple[Point, ...]:
    """Entry points of our groups in every distribution; of two that share a name, those of the first on `sys.path`."""
    if any(finder is not PathFinder and hasattr(finder, "find_distributions") for finder in sys.meta_path):
        return tuple(_of_importlib())
    seen: set[str] = set()
    found: list[Point] = []
    for folder in dict.fromkeys(path):
        if os.path.isfile(folder):  # an archive
            return tuple(_of_importlib())
        for home in _distributions(folder or "."):
            name = re.sub(r"[-_.]+", "_", os.path.basename(home).partition("-")[0]).lower()
            if name not in seen:
                seen.add(name)
                found += _points(home)
    return tuple(found)


def _of_importlib() -> Iterator[Point]:
    from importlib.metadata import entry_points

    for group in GROUPS:
        for point in entry_points(group=group):
            owner = "" if point.dist is None else f"{point.dist.name} {point.dist.version}"
            yield Point(point.group, point.name, point.value, owner=owner)


def _distributions(folder: str) -> list[str]:
    """Folders with the metadata of what is installed in a folder of `sys.path`."""
    try:
        names = sorted(n for n in os.listdir(folder) if n.lower().endswith((".dist-info", ".egg-info")))
    except OSError:
        return []
    inside = ["EGG-INFO"] if folder.lower().endswith(".egg") else []
    return [os.path.join(folder, n) for n in (*inside, *names)]


def _points(home: str) -> Iterator[Point]:
    try:
        text = Path(home, "entry_points.txt").read_text(encoding="utf-8")
    except (OSError, UnicodeError):
        return
    if _OURS not in text:
        return
    group = ""
    for each in map(str.strip, text.splitlines()):
        if each.startswith("[") and each.endswith("]"):
            group = each[1:-1].strip()
        elif group.startswith(_OURS) and "=" in each and not each.startswith("#"):
            name, _, value = each.partition("=")
            yield Point(group, name.strip(), value.strip(), home=home)


def load(point: Point) -> Any:
    """What the entry point names, or the exception that importing it raised: a broken stranger must not stop us."""
    try:
        return point.load()
    except Exception as error:
        return error


def package(point: Point) -> str:
    """Name and version of the package that registers an entry point."""
    if point.owner or not point.home:
        return point.owner or "unknown package"
    from importlib.metadata import PathDistribution

    owner = PathDistribution(Path(point.home))
    return f"{owner.name} {owner.version}"
