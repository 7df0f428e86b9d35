"""Folders around one that still hold its lost tensors: those that `repair` would take them from."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from converter.converters.fill.evidence import step_of
from converter.converters.gather.adapter_config import HEADS
from converter.converters.heads.whole import MISSHAPEN, MISSING, MISTYPED
from converter.converters.merge.adapter_itself import contradictions
from converter.diagnostic import Command, Next, Steps
from converter.examine.diagnoses.case import Case
from converter.families.implied import Shape
from converter.sources.finding import sources

_MOST_LOOKED_AT = 4
"""Folders whose headers are read."""


def from_siblings(case: Case, names: Collection[str]) -> Next:
    """What to type about tensors that are lost: the repair from a copy that has them all, in the shapes asked for.

    A checkpoint of another step has other values: it is named, and nothing is taken from it. Where nothing at hand has
    them: the command that shows what is there.
    """
    ours, others = step_of(str(case.root), state=True), []
    for sibling in _siblings(case):
        if not _serves(case, sibling, names):
            continue
        theirs = step_of(str(sibling.root), state=True)
        if None not in (ours, theirs) and ours != theirs:
            others.append(sibling)
            continue
        return case.repair("--weights-from", sibling.folder, *_base(case, names))
    if others:
        words = f"{others[0].folder} has them, of another step: it is used as it is or not at all; "
        return Steps(words, Command("doctor", (others[0].folder,)))
    shown = case.command("inspect", "--tensors")
    return Steps("nothing at hand has them; every tensor that is there is listed by ", shown)


def _siblings(case: Case) -> Iterator[Case]:
    for near in [n for n in case.near if n.kind == case.kind][:_MOST_LOOKED_AT]:
        survey = sources()[near.source].survey(near.path)
        if survey.error() is None:
            yield Case(near.asked, near.path, case.kind, near.source, survey)


def _serves(case: Case, sibling: Case, names: Collection[str]) -> bool:
    """True for a folder with the lost tensors in the shapes asked for, and all others in the shapes they have here."""
    theirs = sibling.shapes
    asked = _asked(case, names)
    found = {n: [n] if n in theirs else _of_module(n, theirs) for n in names}
    if not all(found.values()) or not all(theirs[n].numel for each in found.values() for n in each):
        return False
    if any(theirs[n].shape != shape for n, shape in asked.items()):
        return False
    both = [n for n, info in case.shapes.items() if n in theirs and n not in names and info.numel]
    if any(theirs[n].shape != case.shapes[n].shape for n in both if theirs[n].numel):
        return False
    return _harmed(sibling).isdisjoint(names)


def _of_module(module: str, names: Collection[str]) -> list[str]:
    """An adapter's factors of a module, where the module is what is lost."""
    return [n for n in names if f".{module}." in n]


def _asked(case: Case, names: Collection[str]) -> Mapping[str, Shape]:
    """The shapes that the class in config.json asks for, where it is known."""
    if case.kind != "model" or not case.config or case.judgement.wanted is None:
        return {}
    saved, plain = case.judgement.wanted.saved, case.plain.names
    return {n: saved[plain.get(n, n)] for n in names if plain.get(n, n) in saved}


def _harmed(folder: Case) -> frozenset[str]:
    """Tensors that a folder itself lacks, or has in shapes or types that contradict its config."""
    if folder.kind == "adapter":
        found = contradictions(folder.shapes, folder.adapter_config, alone=True)
        return frozenset(n for each in found for n in each.names)
    if not folder.config:
        return frozenset()
    return frozenset(n for code in (MISSING, MISSHAPEN, MISTYPED) for n in folder.judgement.names(code))


def _base(case: Case, names: Collection[str]) -> tuple[str, ...]:
    """The base against which a copy is proved: that of a model without a head, which training alone makes."""
    if case.kind != "model" or any(part in HEADS for n in case.shapes if n not in names for part in n.split(".")):
        return ()
    return ("--base", case.base.folder if case.base is not None else "BASE")
