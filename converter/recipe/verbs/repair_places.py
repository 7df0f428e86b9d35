"""Where a run's states lie around a broken folder: in it, beside it, above it, and where the user points."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from converter.converters.fill.evidence import step_of
from converter.core.files import sparse
from converter.core.files.opening import read_limited
from converter.errors import ConvertError
from converter.sources.finding import FindsPlaces, find_place, kind_of, source_kind, sources
from converter.sources.hub.names import SCHEME, as_reference, below
from converter.sources.locate import resolve
from converter.sources.places import by_number
from converter.text import show

MOST_FOLDERS = 400
"""Folders that are looked into; a run keeps a few checkpoints, a home folder has thousands of others."""

MOST_PLACES = 3
"""States that are compared where nothing tells the step."""

_RUN_FOLDER = re.compile(r"(?:checkpoint|global_step|step|epoch|iter)[-_]?\d+", re.ASCII)


@dataclass(frozen=True)
class Found:
    """A trainer's state, or a copy that may be broken itself: as the user would type it, and its step if it has one."""

    path: str
    folder: Path
    step: int | None
    is_copy: bool = False


@dataclass
class Search:
    """What was found, and where nothing was or what can't be read: for the refusal."""

    places: list[Found] = field(default_factory=list)
    looked: list[str] = field(default_factory=list)


def search(src: str, weights_from: Sequence[str], *, token: str | None = None) -> Search:
    """The places that may hold what a folder lost, the likeliest first; all of them may be on the Hub.

    Raises:
        UsageError: a folder that the user named is not there, or holds nothing that can be read.
    """
    root = _root_of(src, token)
    result = Search()
    step = step_of(str(root.resolve()), state=True)
    for text in weights_from:
        result.places += [p for p in _named(text, step, token) if p.folder.resolve() != root.resolve()]
    around = list(_around(src, root))
    chosen = _chosen(around, step, root)
    for place in chosen:
        if place.folder.resolve() in {p.folder.resolve() for p in result.places}:
            continue
        if (fault := _fault(place)) is None:
            result.places.append(place)
        else:
            result.looked.append(f"{show(place.path)}: {fault}")
    passed = [show(p.path) for p in around if p not in chosen]
    if passed:
        result.looked.append(f"not asked, of other steps: {', '.join(passed[-8:])}")
    sparse.expect_all_read()
    if not result.places and not around:
        result.looked.append(f"{show(src)}, beside and above it: no shards of a trainer (global_step*)")
    return result


def _root_of(text: str, token: str | None) -> Path:
    """The folder that is meant; of a repository on the Hub every folder, which the cache may lack."""
    return resolve(text, token=token, in_parts=True, whole=True).path


def _named(text: str, step: int | None, token: str | None) -> list[Found]:
    """What lies where the user points: shards in or below it, or a model or an adapter."""
    root = _root_of(text, token)
    is_copy = source_kind(root) in ("model", "adapter")
    own = [Found(text, root, step_of(str(root.resolve())), is_copy=True)] if is_copy else []
    inside = [_found(text, root, folder) for folder in _states_in(root)]
    states = [p for p in inside if step is not None and p.step == step]
    if not states:
        try:
            states = [_found(text, root, find_place(root, as_reference(text)).folder)]
        except ConvertError:
            states = _chosen(inside, step, root)
            if not states and not own:
                raise
    sound = [p for p in states if _fault(p) is None] if len(states) > 1 else states
    return own + (sound or states)


def _found(text: str, root: Path, folder: Path) -> Found:
    return Found(_typed(text, root, folder), folder, step_of(str(folder.resolve())))


def _typed(text: str, root: Path, folder: Path) -> str:
    """A folder as the user would write it."""
    typed = below(text, root, folder)
    return typed if folder == root or typed.startswith(SCHEME) else os.path.normpath(typed)


def _states_in(root: Path) -> Iterator[Path]:
    """Folders at or below a folder, two levels deep, that are a trainer's state themselves."""
    for folder in _below(root):
        for source in sources().values():
            if isinstance(source, FindsPlaces):
                try:
                    place = source.find(folder, str(folder))
                except ConvertError:
                    continue  # several below, or another layout: each is looked at by itself
                if place is not None and place.folder == folder:
                    yield folder
                    break


def _below(root: Path) -> list[Path]:
    found = [root]
    for level in ([root], _folders(root)):
        found += [p for each in level for p in _folders(each) if p not in found]
    return found[:MOST_FOLDERS]


def _folders(root: Path) -> list[Path]:
    try:
        return sorted((p for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")), key=by_number)
    except OSError:
        return []


def _around(src: str, root: Path) -> Iterator[Found]:
    """States in the folder, then in what looks like checkpoints of the run beside and above it."""
    seen: set[Path] = set()
    real = root.resolve()
    beside = [p for up in (real.parent, real.parent.parent) for p in _folders(up) if _RUN_FOLDER.fullmatch(p.name)]
    for start in (real, *(p for p in beside if p != real)):
        for folder in _states_in(start):
            if folder not in seen:
                seen.add(folder)
                yield _found(src, real, folder)


def _chosen(found: Sequence[Found], step: int | None, root: Path) -> list[Found]:
    """Those of the step that is repaired; else the nearest before it; else, where no step is known, the last few."""
    if step is not None:
        same = [p for p in found if p.step == step]
        unknown = [p for p in found if p.step is None]
        before = [p for p in found if p.step is not None and p.step < step]
        after = [p for p in found if p.step is not None and p.step > step]
        nearest = sorted(before, key=lambda p: p.step or 0)[-1:] or sorted(after, key=lambda p: p.step or 0)[:1]
        return same + unknown[:MOST_PLACES] if same or unknown else nearest
    named = _latest(root)
    obeyed = [p for p in found if named is not None and p.folder == root.resolve() / named]
    return obeyed or sorted(found, key=lambda p: by_number(p.folder), reverse=True)[:MOST_PLACES]


def _latest(root: Path) -> str | None:
    """The tag that DeepSpeed's `latest` names in a folder."""
    try:
        name = read_limited(root / "latest", limit=4096, root=root).decode("utf-8", "replace").strip()
    except ConvertError:
        return None
    return name if "\0" not in name else None


def _fault(place: Found) -> str | None:
    """Why a state can't be read; None where it can."""
    kind = kind_of(place.folder)
    try:
        sources()[kind or ""].open(place.folder, asked=place.path)
    except ConvertError as error:
        return f"{error.code}: {error.what}"
    except KeyError:
        return "nothing that can be read"
    return None
