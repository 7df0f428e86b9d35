"""Which source takes a folder, and where below it a trainer's state lies."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

from converter.diagnostic import Command
from converter.errors import UsageError
from converter.plugins import SOURCES, load, named
from converter.sources.one_file import place_in
from converter.sources.places import no_parts
from converter.text import show

if TYPE_CHECKING:
    from converter.core.checkpoint import Checkpoint
    from converter.core.tensors.nodes import LazyTensor
    from converter.sources.places import Place
    from converter.sources.survey import SourceKind, Survey

RUN_CHECKPOINT = re.compile(r"(?:checkpoint|global_step|step)[-_]?\d+", re.ASCII)


@runtime_checkable
class Source(Protocol):
    """Turns what lies in a folder into a checkpoint, by reading headers only; `sources.base` has classes to begin with.

    Attributes:
        kind: what its folders are: `model`, `adapter`, `training`, or `unread`.
    """

    name: str
    kind: SourceKind

    def detect(self, root: Path) -> str | None:
        """Why this folder is of the source's kind, or None."""

    def survey(self, root: Path) -> Survey:
        """What lies there; never raises on content."""

    def open(self, root: Path, *, asked: str, revision: str | None = None, keep_code: bool = False) -> Checkpoint:
        """The checkpoint, or a refusal."""


@runtime_checkable
class KeepsMasters(Protocol):
    """A source whose checkpoints hold fp32 masters beside the weights in the dtype of training."""

    def open_masters(
        self, root: Path, *, asked: str, revision: str | None = None, keep_code: bool = False
    ) -> Checkpoint:
        """The checkpoint with trained tensors as their masters, or a refusal."""


@runtime_checkable
class KeepsMoments(Protocol):
    """A source whose checkpoints hold Adam's moments by parameter."""

    def adam_moments(
        self, root: Path, *, which: Literal["exp_avg", "exp_avg_sq"], allow: Collection[str] = ()
    ) -> dict[str, LazyTensor]:
        """The first or the second moment of every trained parameter, by its name in memory, or a refusal."""


@runtime_checkable
class FindsPlaces(Protocol):
    """A source whose checkpoints may lie below the folder that a user names: by tag, by step, by part of a trainer.

    One that tells parts of a trainer apart says so with `has_parts = True`; others are never asked for one.
    """

    def find(self, root: Path, asked: str, *, tag: str | None = None, part: str | None = None) -> Place | None:
        """The one that is meant and why; None where nothing at or below `root` is of this source.

        Args:
            tag: the folder's name, as `--tag` says.
            part: which model, where a trainer keeps several (`actor`, `critic`), as `--part` says.

        Raises:
            UsageError: several to choose from (`several-checkpoints`), or not what was asked for (`no-such-tag`).
        """


@cache
def sources() -> Mapping[str, Source]:
    """Every usable source, in the order in which they are asked; one that can't be imported is left out.

    A source may have a `precedence`, an int: 0 if it has none, and higher ones are asked first.
    """
    found: dict[str, Source] = {}
    for name, points in named(SOURCES).items():
        loaded = load(points[0])
        if isinstance(loaded, Source):
            found[name] = loaded
    return dict(
        sorted(found.items(), key=lambda item: (-getattr(item[1], "precedence", 0), item[1].kind != "adapter", item[0]))
    )


def find_place(root: Path, asked: str, *, tag: str | None = None, part: str | None = None) -> Place:
    """The trainer's state that a user means by a folder: in it, or below it.

    Raises:
        UsageError: nothing (`no-shards`), several to choose from (`several-checkpoints`), or a part of what has none
            (`no-parts`).
        Refused: a layout that is recognised and not read.
    """
    found: dict[Path, Place] = {}
    without_parts = ""
    for name, source in sources().items():
        if not isinstance(source, FindsPlaces):
            continue
        has_parts = getattr(source, "has_parts", False) is True
        place = source.find(root, asked, tag=tag, part=part if has_parts else None)
        if place is not None:
            found[place.folder] = place
            without_parts = "" if has_parts else name
    if len(found) > 1:
        listed = ", ".join(show(os.path.join(asked, os.path.relpath(p, root))) for p in found)
        what = "trainers' states of several kinds; name one of them"
        raise UsageError("several-checkpoints", what, where=show(asked), expected=listed)
    if not found:
        here = kind_of(root)
        if here is not None and sources()[here].kind in ("training", "unread"):
            sources()[here].open(root, asked=asked)
        below = root.is_dir() and tag is None and any(p.is_dir() and kind_of(p) for p in root.iterdir())
        if not below and (alone := place_in(root, asked, tag)) is not None:
            if part is not None:
                raise no_parts("a script", asked, part)
            return alone
        raise UsageError(
            "no-shards",
            "there are no shards of a trainer here",
            where=show(asked),
            expected="a folder such as global_step500, its parent, or the run's folder",
            next=Command("inspect", (asked,)),
        )
    if part is not None and without_parts:
        raise no_parts(without_parts, asked, part)
    return next(iter(found.values()))


def kind_of(path: Path) -> str | None:
    """Name of the source that would open this folder, or None."""
    return next((name for name, source in sources().items() if source.detect(path)), None)


def source_kind(path: Path) -> SourceKind | None:
    """What a folder is to the source that would open it: `model`, `adapter`, `training` or `unread`; or None."""
    name = kind_of(path)
    return None if name is None else sources()[name].kind


def nothing_in(path: Path, asked: str) -> UsageError:
    """The error for a folder that no source takes: the checkpoints below it, else what is there."""
    from converter.sources.hub.names import as_reference

    asked = as_reference(asked)
    inside = sorted(p for p in path.iterdir() if p.is_dir() and kind_of(p)) if path.is_dir() else []
    if inside:
        runs = sorted(inside, key=lambda p: [int(n) for n in re.findall(r"\d+", p.name)])
        listed = ", ".join(show(f"{asked.rstrip('/')}/{p.name}") for p in runs[-8:])
        listed += f", and {len(runs) - 8} more" if len(runs) > 8 else ""
        is_run = any(RUN_CHECKPOINT.fullmatch(p.name) for p in runs)
        many = "one checkpoint; name that" if len(runs) == 1 else f"{len(runs)} checkpoints; name one of them"
        what = f"a run folder with {many}" if is_run else "name the folder inside it"
        return UsageError("several-checkpoints", what, where=show(asked), expected=listed)
    names = sorted(p.name for p in path.iterdir())[:8] if path.is_dir() else []
    return UsageError(
        "not-a-checkpoint",
        "neither a model nor an adapter that can be read",
        where=show(asked),
        expected="config.json with *.safetensors, or adapter_config.json with adapter_model.safetensors",
        got=", ".join(show(n) for n in names) or "an empty folder",
    )
