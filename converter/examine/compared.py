"""Whether names and shapes were compared with what a load asks for: an all-clear without that says so, and why."""

from __future__ import annotations

from collections.abc import Collection

from converter.examine.diagnoses.adapters import NOT_MERGED_HERE
from converter.examine.diagnoses.case import Case, Finding
from converter.examine.diagnoses.gathered import gathered_of
from converter.examine.diagnoses.whole import judgement_of
from converter.text import show

_OF_MODEL = "names and shapes not compared with a model"
_OF_BASE = "not compared with a base"


def not_compared(case: Case, findings: Collection[Finding]) -> str:
    """Why nobody here can say that a folder is whole, in words; empty where its tensors were compared."""
    if case.kind == "adapter":
        return _without_base(case, findings)
    if case.kind == "training":
        why = gathered_of(case).why
        return f"{_OF_MODEL}: {why}" if why else ""
    if case.kind == "run":
        return "its checkpoints are not examined"
    found = judgement_of(case)
    if found is None:
        return _OF_MODEL
    if found.unknown:
        return found.unknown
    if found.wanted is not None and found.wanted.free and found.dialect is None:
        return "what is not in the backbone is not checked: config.json names no class of transformers"
    return ""


def _without_base(case: Case, findings: Collection[Finding]) -> str:
    """Of an adapter: a base that can't be read, or a method whose keys nothing here places, compares nothing."""
    if case.base is None:
        return _OF_BASE
    if case.base.kind != "model" or case.base.survey.error():
        return f"{_OF_BASE}: {show(case.base.asked)} is not a model that can be read"
    stopped = next((f.code for f in findings if f.code in NOT_MERGED_HERE), None)
    return f"{_OF_BASE}: {stopped}" if stopped is not None else ""
