"""Every fault of a folder: what it is, what lies around it, what each diagnosis says. Headers only, unless deep."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import islice
from pathlib import Path
from types import ModuleType

from converter.blanks import without_blanks
from converter.core.context import Context
from converter.core.files import sparse
from converter.core.files.names import ADAPTER_CONFIG
from converter.core.writer.reporter import Reporter, Silent
from converter.diagnostic import Command, Severity
from converter.dialects.known import trainers
from converter.errors import ConvertError, Refused, UsageError
from converter.examine.compared import not_compared
from converter.examine.diagnoses.adapters import NOT_MERGED_HERE
from converter.examine.diagnoses.aims import aim, is_transformers_4, roles_of
from converter.examine.diagnoses.case import SEVERITIES, Case, Diagnosis, Finding, Kind, Near
from converter.examine.diagnoses.causes import one_per_cause, with_steps
from converter.examine.diagnoses.faults import NOT_READ_HERE, undocumented
from converter.examine.diagnoses.gathered import as_written, gathered_of
from converter.examine.diagnoses.script import read_launch
from converter.examine.diagnoses.values import stored
from converter.plugins import DIAGNOSES, loaded
from converter.sources.finding import FindsPlaces, Source, kind_of, nothing_in, sources
from converter.sources.hf.loose import survey_files
from converter.sources.hub.names import SCHEME, as_reference, below
from converter.sources.locate import resolve
from converter.sources.opening import beside_adapter
from converter.sources.places import by_number
from converter.sources.survey import Survey, file_names, is_weight_file
from converter.text import nearest, show

MOST_NEAR = 64
"""Folders around one that are looked into."""

MOST_LISTED = 4000
"""Entries of a folder that are looked at: a home folder or a bucket's mount may have any number."""

_OF_VALUES = ("zero-tensors", "suspicious-values", "copied-tensors")
"""Diagnoses of values that know a model by its names: of a trainer's state they look at what would be gathered."""

RUN_FOLDER = re.compile(r"(?:tmp-)?(?:checkpoint|global_step|step|epoch|iter)[-_]?\d+(?:_hf)?", re.ASCII)
_WORD = re.compile(r"[A-Za-z]{2,}", re.ASCII)


@dataclass(frozen=True)
class Report:
    """What was found, the worst first.

    Attributes:
        not_compared: why names and shapes were not compared with what a load asks for; empty where they were.
    """

    case: Case
    findings: tuple[Finding, ...]
    not_compared: str = ""

    def worst(self) -> Severity | None:
        """The severity of the worst finding."""
        return next((s for s in SEVERITIES if any(f.severity == s for f in self.findings)), None)

    def is_for_others(self) -> bool:
        """True for what is neither merged nor gathered here, and has no fault: another tool has to."""
        return any(f.code in {"adapter-bias", *NOT_MERGED_HERE, *NOT_READ_HERE} for f in self.findings)


@dataclass(frozen=True)
class DoctorRequest:
    """What the user asked to be examined, and with what beside it."""

    path: str
    base: str | None = None
    weights_from: tuple[str, ...] = ()
    target: str | None = None
    actor: str | None = None
    ignore: tuple[str, ...] = ()
    deep: bool = False
    revision: str | None = None
    launch: str | None = None
    resume_on: int | None = None
    reporter: Reporter = field(default_factory=Silent)


@cache
def diagnoses() -> Mapping[str, Diagnosis]:
    """Every diagnosis by its code, ours and strangers'."""
    found: dict[str, Diagnosis] = {}
    for value in loaded(DIAGNOSES):
        for each in _diagnoses_of(value):
            found[each.code] = each
    return found


def _diagnoses_of(value: object) -> list[Diagnosis]:
    """What an entry point names: a module with all its diagnoses, in their order there, some of them, or one."""
    if isinstance(value, ModuleType):
        inside = [v for v in vars(value).values() if isinstance(v, Diagnosis)]
        return [d for d in inside if d.find.__module__ == value.__name__]
    return [d for d in (value if isinstance(value, tuple) else (value,)) if isinstance(d, Diagnosis)]


def examine(asked: DoctorRequest) -> Report:
    """Run every diagnosis over a folder; none stops at the first fault, and content never raises.

    Raises:
        UsageError: nothing is there, or nothing that is recognised (`not-a-checkpoint`), an unknown code to ignore.
    """
    known = diagnoses()
    unknown = [c for c in asked.ignore if c not in known]
    if unknown:
        raise UsageError("unknown-code", f"no diagnosis has the code {show(unknown[0])}", next=Command("explain"))
    case = case_of(asked)
    context = Context(heard=asked.reporter.advance)
    if asked.deep:
        asked.reporter.start(sum(tensor.info.nbytes for _, tensor in stored(case)), 0)
    findings: list[Finding] = []
    if case.kind == "training":
        case.survey.faults += gathered_of(case).faults
    written = as_written(case) if case.deep and case.kind == "training" else None
    for each in known.values():
        if each.code not in asked.ignore:
            if each.deep:
                asked.reporter.checking(each.code)
            findings += each(case, context)
            findings += each(written, context) if written is not None and each.code in _OF_VALUES else []
    findings += [f for f in undocumented(case, known) if f.code not in asked.ignore]
    sparse.expect_all_read()
    told = [_typeable(f) for f in with_steps(one_per_cause(dict.fromkeys(findings)), case)]
    worst_first = tuple(sorted(told, key=lambda f: SEVERITIES.index(f.severity)))
    return Report(case, worst_first, not_compared(case, worst_first))


def _typeable(finding: Finding) -> Finding:
    """A finding whose commands have no blanks for the user to fill in."""
    return replace(finding, next=without_blanks(finding.next))


def case_of(asked: DoctorRequest) -> Case:
    """The folder with all that is known around it.

    Raises:
        UsageError: see `examine`; a trainer for `--for` that nobody knows, a script that can't be read.
    """
    _expect_known(asked.target)
    file = Path(asked.path).expanduser()
    if is_weight_file(file.name) and file.is_file() and not any(s.detect(file.parent) for s in sources().values()):
        root = file.parent
        source, kind, survey, why = _lone(file)
    else:
        located = resolve(asked.path, revision=asked.revision, in_parts=True)
        root = located.path if located.path.is_dir() else located.path.parent
        source, kind, survey, why = _what(root, asked.path, deep=asked.deep)
    near = tuple(_near(root, asked))
    base = _base(asked, root, kind)
    actor = None if asked.actor is None else case_of(DoctorRequest(asked.actor))
    launch = None if asked.launch is None else read_launch(asked.launch)
    target = asked.target or (launch.trainer if launch is not None else None)
    more = (actor, target, asked.deep, launch, asked.resume_on)
    return Case(asked.path, root, kind, source, survey, why, near, base, *more)


def _expect_known(target: str | None) -> None:
    """Raises UsageError where no trainer has that name (`unknown-trainer`) or version (`trainer-version`)."""
    if target is None or is_transformers_4(target):
        return
    name = target.partition("@")[0]
    if name not in trainers():
        near = nearest(name, trainers())
        raise UsageError(
            "unknown-trainer",
            f"no trainer is named `{show(name)}`",
            expected=", ".join(trainers()),
            next=f"did you mean `{near[0]}`?" if near else Command("list"),
        )
    for role in roles_of(name):
        with suppress(Refused):
            aim(target, role)


def _what(root: Path, asked: str, *, deep: bool = False) -> tuple[str | None, Kind, Survey, str]:
    for name, source in sources().items():
        why = source.detect(root)
        if why:
            survey = _survey(source, root, deep=deep)
            kind: Kind = source.kind
            if kind in ("model", "adapter") and not survey.files and (shards := _shards_in(root, asked)) is not None:
                held = sources()[shards]
                found = held.detect(root) or f"{why}, and the weights are in a trainer's shards below it"
                return shards, "training", _survey(held, root, deep=deep), found
            return name, kind, survey, why
    if checkpoints_in(root):
        return None, "run", Survey(root), "checkpoints are in folders below"
    if any(is_weight_file(n) for n in file_names(root)):
        return None, "weights", survey_files(root), "a weight file, and no config that says what it is"
    raise nothing_in(root, asked)


def _lone(file: Path) -> tuple[str | None, Kind, Survey, str]:
    """A weight file that was named itself, in a folder that is no checkpoint."""
    return (
        None,
        "weights",
        survey_files(file.parent, only=file.name),
        "a weight file, and no config that says what it is",
    )


def _survey(source: Source, root: Path, *, deep: bool) -> Survey:
    """Every rank's file is read where values are asked for; else, of a source that knows how, one and the sizes."""
    quick = getattr(source, "survey_quickly", None)
    return quick(root) if quick is not None and not deep else source.survey(root)


def _shards_in(root: Path, asked: str) -> str | None:
    """The source of shards at or below a folder that has a config, and no weights of its own."""
    for name, source in sources().items():
        if isinstance(source, FindsPlaces) and source.kind == "training":
            try:
                place = source.find(root, asked)
            except ConvertError:
                continue
            if place is not None and place.folder.is_relative_to(root):
                return name
    return None


def checkpoints_in(root: Path) -> list[Path]:
    """Folders of a run that some source reads, by the numbers in their names."""
    inside = _folders(root)
    likely = [p for p in inside if RUN_FOLDER.fullmatch(p.name)]
    others = [p for p in inside if not RUN_FOLDER.fullmatch(p.name)][:MOST_NEAR]
    found = [p for p in (*likely[-MOST_NEAR:], *others) if any(s.detect(p) for s in sources().values())]
    return sorted(found, key=by_number)


def _near(root: Path, asked: DoctorRequest) -> Iterable[Near]:
    """Folders in, beside and above `root` that some source reads, and those that were given."""
    seen: set[str] = {os.path.realpath(root)}
    for text in asked.weights_from:
        yield from _place(resolve(text, in_parts=True, whole=True).path, as_reference(text), seen, given=True)
    if any(str(root) == each for each in sparse.folders):
        # A repository: nothing of it is beside or above.
        for path in _folders(root)[:MOST_NEAR]:
            yield from _place(path, _typed(asked.path, root, path), seen, given=False)
        return
    for path in [*_folders(root), *_akin(root)][:MOST_NEAR]:
        yield from _place(path, _typed(asked.path, root, path), seen, given=False)
    for near in _place(root.parent, _typed(asked.path, root, root.parent), seen, given=False):
        if near.path == root.parent:  # what lies in another folder below it is not of this one
            yield near


def _akin(root: Path) -> list[Path]:
    """Folders beside one that may be of its run: checkpoints by their names, and names that share a word with it.

    Others, as a neighbour's model in a folder of models, are none of its business: a source that is recommended must
    be of the same run.
    """
    real = Path(os.path.realpath(root))
    words = {w.lower() for w in _WORD.findall(real.name)}
    beside = [p for p in _folders(real.parent) if p != real]
    return [p for p in beside if RUN_FOLDER.fullmatch(p.name) or words & {w.lower() for w in _WORD.findall(p.name)}]


def _place(path: Path, asked: str, seen: set[str], *, given: bool) -> Iterable[Near]:
    if os.path.realpath(path) in seen:
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
        if os.path.realpath(folder) not in seen:
            seen.update((os.path.realpath(path), os.path.realpath(folder)))
            typed = os.path.join(asked, os.path.relpath(folder, path)) if folder != path else asked
            yield Near(typed, folder, name, given)
        return


def _folders(root: Path) -> list[Path]:
    """Folders below one, by their numbers, hidden ones left out; of a huge folder those that are listed first."""
    try:
        with os.scandir(root) as listed:
            names = [e.name for e in islice(listed, MOST_LISTED) if not e.name.startswith(".") and e.is_dir()]
    except OSError:
        return []
    return sorted((root / n for n in names), key=by_number)


def _typed(asked: str, root: Path, path: Path) -> str:
    """A folder's path as the user would type it, next to the one that was typed."""
    if not asked:
        return str(path)
    typed = below(asked, Path(os.path.realpath(root)), Path(os.path.realpath(path)))
    if typed.startswith(SCHEME):
        return typed
    typed = os.path.normpath(typed)
    return f"./{typed}" if asked.startswith("./") and not typed.startswith(".") else typed


def _base(asked: DoctorRequest, root: Path, kind: Kind) -> Case | None:
    """The base model, where it is at hand; only its headers are read."""
    name = asked.base
    if name is None and kind == "adapter":
        survey_case = Case(asked.path, root, kind, None, Survey(root))
        recorded = survey_case.json(ADAPTER_CONFIG).get("base_model_name_or_path")
        name = beside_adapter(recorded, root, asked.path) if isinstance(recorded, str) and recorded else None
    if name is None:
        return None
    try:
        located = resolve(name, revision=None, allow_download=False, in_parts=name == asked.base)
        if asked.base is None and kind_of(located.path) is None:
            return None  # a name that an adapter records is looked at, and nothing below it
        source, found, survey, why = _what(located.path, name)
    except (ConvertError, OSError):
        if asked.base is not None:
            raise
        return None
    return Case(name, located.path, found, source, survey, why)


def file_of(finding: Finding, case: Case) -> str:
    """The file that a finding is about, which its evidence begins with; empty for one about the folder."""
    first = finding.evidence[0] if finding.evidence else ""
    at_fault = {Path(f.where).name for f in case.survey.faults if f.where and f.where != show(case.root)}
    return first if first in case.names or first in at_fault else ""


def at_or_above(severity: str, findings: Sequence[Finding]) -> list[Finding]:
    """Findings that are as bad as `severity` or worse."""
    limit = SEVERITIES.index(severity)
    return [f for f in findings if SEVERITIES.index(f.severity) <= limit]
