"""Finds the sets of weight files in a model folder: a whole file, shards of each total, files of an index, pickles."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from converter.core.checkpoint import WeightSet
from converter.core.files.names import MODEL_CONFIG, MODEL_INDEX, MODEL_PICKLED, MODEL_WEIGHTS, PICKLED_INDEX
from converter.core.files.strict_json import MAX_JSON_BYTES, load_json
from converter.core.formats.safetensors_io import read_index
from converter.core.formats.weight_file import WeightFile
from converter.diagnostic import Command
from converter.errors import Refused
from converter.families.coverage import Judged, judged
from converter.sources import survey as folder
from converter.sources.survey import Fault, Survey
from converter.text import fold, show

CODE = "weight-sets"
OF_THE_INDEX = frozenset({"index-malformed", "index-conflict", "index-phantom"})
"""Faults of the index alone: where the files have all that the config implies, an output's new index fixes them."""

_MOST_MISSING = 3

Read = Callable[[str], WeightFile]


@dataclass(frozen=True)
class SetFiles:
    """The names of a set's files that are there, and of those that should be."""

    name: str
    files: tuple[str, ...]
    missing: tuple[str, ...] = ()


def find_sets(root: Path, names: frozenset[str], *, pickled: bool = True) -> list[SetFiles]:
    """Every set, the one that transformers reads first; two that are the same files are one."""
    found: dict[tuple[str, ...], SetFiles] = {}
    for each in _sets(root, names, pickled=pickled):
        found.setdefault((*each.files, *each.missing), each)
    return [s for s in found.values() if s.files]


def _sets(root: Path, names: frozenset[str], *, pickled: bool) -> Iterator[SetFiles]:
    kinds = [(MODEL_WEIGHTS, MODEL_INDEX, folder.SHARD)]
    if pickled:
        kinds.append((MODEL_PICKLED, PICKLED_INDEX, folder.PICKLED_SHARD))
    for whole, index, shard in kinds:
        if whole in names:
            yield SetFiles(whole, (whole,))
        if index in names:
            yield from _listed(root, names, index)
        totals = sorted({m[2] for n in names if (m := shard.fullmatch(n))}, key=int)
        for total in totals:
            yield _of_total(names, shard, total)


def _listed(root: Path, names: frozenset[str], index: str) -> Iterator[SetFiles]:
    """The files of an index, which is a claim; one that can't be read lists nothing."""
    try:
        files = sorted(set(read_index(root / index, root=root).weight_map.values()))
    except (Refused, OSError):
        return
    missing = tuple(f for f in files if f not in names)
    yield SetFiles(_pattern(files) or f"the files of {index}", tuple(f for f in files if f in names), missing)


def _pattern(files: list[str]) -> str | None:
    """`model-*-of-00003.safetensors` where all files are of that total."""
    patterns = {re.sub(r"-\d+-of-", "-*-of-", f) for f in files}
    return patterns.pop() if len(patterns) == 1 else None


def _of_total(names: frozenset[str], shard: re.Pattern[str], total: str) -> SetFiles:
    here = {int(m[1]): n for n in names if (m := shard.fullmatch(n)) and m[2] == total}
    absent = [i for i in range(1, min(int(total), len(here) + _MOST_MISSING) + 1) if i not in here]
    start, _, rest = next(iter(here.values())).rpartition("-of-")
    width = len(start.rpartition("-")[2])
    stem = start[:-width]
    files = tuple(here[i] for i in sorted(here))
    return SetFiles(f"{stem}*-of-{rest}", files, tuple(f"{stem}{i:0{width}d}-of-{rest}" for i in absent))


@dataclass(frozen=True)
class Choice:
    """What the sets of a folder amount to, by headers.

    Attributes:
        sets: each with what it lacks, the one that loaders read first.
        headers: of every file that can be read.
        chosen: the set to go on with where it isn't the one that loaders read, or has tensors twice.
        fault: what to say of it, if anything is wrong.
    """

    sets: tuple[Judged, ...]
    headers: Mapping[str, WeightFile]
    chosen: SetFiles | None
    fault: Fault | None


def choose(root: Path, names: frozenset[str], survey: Survey, read: Read, *, every: bool = False) -> Choice | None:
    """What to make of a folder with several sets, or with a set that has tensors twice; None for any other folder.

    Args:
        survey: of the set that loaders read.
        every: judge pickled sets too where what loaders read is sound.
    """
    errors = [f for f in survey.faults if f.severity == "error"]
    twice = any(f.code == "tensor-twice" for f in errors)
    found = find_sets(root, names, pickled=every or bool(errors))
    stale = every and bool(errors) and all(f.code in OF_THE_INDEX for f in errors)
    if not found or (len(found) < 2 and not twice and not stale and not _is_astray(errors, survey)):
        return None
    config = _config(root)
    if config is None:
        return None
    headers: dict[str, WeightFile] = {}
    every_set = judged([_read(each, read, headers) for each in found], config)
    return Choice(every_set, headers, *_chosen(root, found, every_set, errors, survey))


def _is_astray(errors: list[Fault], survey: Survey) -> bool:
    """True where the index names files of which none is here: what is here may be the model under other names."""
    return not survey.files and any(f.code == "shard-missing" for f in errors)


def _config(root: Path) -> Mapping[str, Any] | None:
    try:
        value = load_json(root / MODEL_CONFIG, limit=MAX_JSON_BYTES, root=root, allow_nan=True)
    except (Refused, OSError):
        return None
    return value if isinstance(value, dict) else None


def _read(each: SetFiles, read: Read, headers: dict[str, WeightFile]) -> WeightSet:
    faults = []
    if each.missing:
        faults.append(f"{fold(each.missing)} {'is' if len(each.missing) == 1 else 'are'} missing")
    files = {}
    for file in each.files:
        try:
            headers[file] = headers.get(file) or read(file)
        except Refused as error:
            what = "a pointer of git-lfs" if error.facts.get("instead") == "git-lfs" else error.what
            faults.append(f"{show(file)}: {what}")
        else:
            files[file] = headers[file].tensors
    return WeightSet(each.name, files, tuple(faults))


def _chosen(
    root: Path, found: list[SetFiles], sets: tuple[Judged, ...], errors: list[Fault], survey: Survey
) -> tuple[SetFiles | None, Fault | None]:
    first = sets[0]
    whole = [n for n, each in enumerate(sets) if each.covers]
    is_read = not survey.files.keys() ^ first.set.files.keys()  # of several totals without an index none is
    if not first.lacks and is_read:
        stale = any(f.code in OF_THE_INDEX for f in errors)
        if first.empty or (not first.set.twice and not stale):
            return None, None
        if not first.set.twice:
            return found[0], None
        return found[0], _fault(root, f"{_twice(first)}; a repair keeps one copy where they are equal")
    if any(f.code in ("config-missing", "json-malformed") for f in errors):
        return None, None
    if not whole:
        return None, (_fault(root, nothing_whole(sets)) if errors and len(sets) > 1 else None)
    others = [show(sets[n].set.name) for n in whole]
    text = "what loaders read is not the model that config.json implies"
    if not is_read:
        text = "no index tells which of several sets of shards is the model"
    if _is_astray(errors, survey):
        text = "the index names files of which none is here"
    if len(whole) > 1:
        text += f"; {' and '.join(others)} each have all of it, and a repair compares their values"
    elif sets[whole[0]].set.twice:
        text += f"; {others[0]} alone has all {sets[whole[0]].total} tensors, {_twice(sets[whole[0]])}"
    else:
        text += f"; {others[0]} alone has all {sets[whole[0]].total} tensors, once each"
    lacking = [each.words for n, each in enumerate(sets) if n not in whole]
    return found[whole[0]], _fault(root, ". ".join([text, *lacking]))


def told_of(fault: Fault, sets: tuple[Judged, ...]) -> Fault:
    """The fault of files that nothing reads beside those that are read, with what is wrong with each set of them."""
    broken = [each.words for each in sets[1:] if each.set.faults]
    if fault.code != "stale-shards" or not broken:
        return fault
    return replace(fault, text=". ".join([fault.text, *broken, "vLLM reads these files too, and stops at them"]))


def _twice(each: Judged) -> str:
    names = each.set.twice
    files = sorted({f for files in names.values() for f in files})
    return f"{fold(names)} in {len(files)} files at once ({fold(files)})"


def nothing_whole(sets: tuple[Judged, ...]) -> str:
    """The sentence for a folder in which no set covers what the config implies."""
    return f"none of {len(sets)} sets of weight files has what config.json implies. " + ". ".join(s.words for s in sets)


def _fault(root: Path, text: str) -> Fault:
    return Fault(code=CODE, severity="error", text=text, where=show(root), next=Command("repair", (str(root), "OUT")))
