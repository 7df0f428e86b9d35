"""Every fault of a folder: what it is, what lies around it, what each diagnosis says. Headers only, unless deep."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from converter.context import Context
from converter.diagnoses.faults import undocumented
from converter.diagnoses.model import SEVERITIES, Case, Diagnosis, Finding, Kind, Near, Severity
from converter.errors import ConvertError, UsageError, show
from converter.registry import DIAGNOSES, FindsPlaces, loaded, nothing_in, sources
from converter.sources.locate import resolve
from converter.sources.places import by_number
from converter.sources.survey import ADAPTER_CONFIG, Survey, file_names, is_weight_file

_MOST_NEAR = 64
_KINDS: Mapping[str, Kind] = {"hf": "model", "peft": "adapter", "unread": "unread"}


@dataclass(frozen=True)
class Report:
    """What was found, the worst first."""

    case: Case
    findings: tuple[Finding, ...]

    def worst(self) -> Severity | None:
        """The severity of the worst finding."""
        return next((s for s in SEVERITIES if any(f.severity == s for f in self.findings)), None)


@dataclass(frozen=True)
class Asked:
    """What the user asked to be examined, and with what beside it."""

    path: str
    base: str | None = None
    weights_from: tuple[str, ...] = ()
    target: str | None = None
    actor: str | None = None
    ignore: tuple[str, ...] = ()
    deep: bool = False
    revision: str | None = None


@cache
def diagnoses() -> Mapping[str, Diagnosis]:
    """Every diagnosis by its code, ours and strangers'."""
    found: dict[str, Diagnosis] = {}
    for value in loaded(DIAGNOSES):
        for each in value if isinstance(value, tuple) else (value,):
            if isinstance(each, Diagnosis):
                found[each.code] = each
    return found


def examine(asked: Asked) -> Report:
    """Run every diagnosis over a folder; none stops at the first fault, and content never raises.

    Raises:
        UsageError: nothing is there, or nothing that is recognised (`not-a-checkpoint`), an unknown code to ignore.
    """
    known = diagnoses()
    unknown = [c for c in asked.ignore if c not in known]
    if unknown:
        raise UsageError("unknown-code", f"no diagnosis has the code {show(unknown[0])}", next="rlhf-convert explain")
    case = case_of(asked)
    context = Context()
    findings: list[Finding] = []
    for each in known.values():
        if each.code not in asked.ignore:
            findings += each(case, context)
    findings += [f for f in undocumented(case, known) if f.code not in asked.ignore]
    unique = dict.fromkeys(findings)
    return Report(case, tuple(sorted(unique, key=lambda f: SEVERITIES.index(f.severity))))


def case_of(asked: Asked) -> Case:
    """The folder with all that is known around it.

    Raises:
        UsageError: see `examine`.
    """
    located = resolve(asked.path, revision=asked.revision, allow_download=False)
    root = located.path if located.path.is_dir() else located.path.parent
    source, kind, survey, why = _what(root, asked.path)
    near = tuple(_near(root, asked))
    base = _base(asked, root, kind)
    actor = None if asked.actor is None else case_of(Asked(asked.actor))
    return Case(asked.path, root, kind, source, survey, why, near, base, actor, asked.target, asked.deep)


def _what(root: Path, asked: str) -> tuple[str | None, Kind, Survey, str]:
    for name, source in sources().items():
        why = source.detect(root)
        if why:
            return name, _KINDS.get(name, "training"), source.survey(root), why
    if checkpoints_in(root):
        return None, "run", Survey(root), "checkpoints are in folders below"
    if any(is_weight_file(n) for n in file_names(root)):
        return None, "weights", Survey(root), "a weight file, and no config that says what it is"
    raise nothing_in(root, asked)


def checkpoints_in(root: Path) -> list[Path]:
    """Folders of a run that some source reads, by the numbers in their names."""
    try:
        inside = [p for p in root.iterdir() if p.is_dir()]
    except OSError:
        return []
    found = [p for p in inside if any(s.detect(p) for s in sources().values())]
    return sorted(found, key=by_number)


def _near(root: Path, asked: Asked) -> Iterable[Near]:
    """Folders beside, above and in `root` that some source reads, and those that were given."""
    seen: set[Path] = {root.resolve()}
    for text in asked.weights_from:
        path = Path(text).expanduser()
        yield from _place(path, text, seen, given=True)
    around = [*_folders(root), *_folders(root.parent), root.parent]
    for path in around[:_MOST_NEAR]:
        yield from _place(path, _typed(asked.path, root, path), seen, given=False)


def _place(path: Path, asked: str, seen: set[Path], *, given: bool) -> Iterable[Near]:
    real = path.resolve()
    if real in seen:
        return
    for name, source in sources().items():
        try:
            if source.detect(path) is None:
                continue
            folder = path
            if isinstance(source, FindsPlaces) and (place := source.find(path, asked)) is not None:
                folder = place.folder
        except (ConvertError, OSError):
            continue
        if folder.resolve() not in seen:
            seen.update((real, folder.resolve()))
            yield Near(
                os.path.join(asked, os.path.relpath(folder, path)) if folder != path else asked, folder, name, given
            )
        return


def _folders(root: Path) -> list[Path]:
    try:
        return sorted((p for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")), key=by_number)
    except OSError:
        return []


def _typed(asked: str, root: Path, path: Path) -> str:
    """A folder's path as the user would type it, next to the one that was typed."""
    return os.path.normpath(os.path.join(asked, os.path.relpath(path, root))) if asked else str(path)


def _base(asked: Asked, root: Path, kind: Kind) -> Case | None:
    """The base model, where it is at hand; only its headers are read."""
    name = asked.base
    if name is None and kind == "adapter":
        survey_case = Case(asked.path, root, kind, None, Survey(root))
        recorded = survey_case.json(ADAPTER_CONFIG).get("base_model_name_or_path")
        name = recorded if isinstance(recorded, str) and recorded else None
    if name is None:
        return None
    try:
        located = resolve(name, revision=None, allow_download=False)
        source, found, survey, why = _what(located.path, name)
    except (ConvertError, OSError):
        if asked.base is not None:
            raise
        return None
    return Case(name, located.path, found, source, survey, why)


def at_or_above(severity: str, findings: Sequence[Finding]) -> list[Finding]:
    """Findings that are as bad as `severity` or worse."""
    limit = SEVERITIES.index(severity)
    return [f for f in findings if SEVERITIES.index(f.severity) <= limit]
