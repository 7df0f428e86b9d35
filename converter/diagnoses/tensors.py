"""Empty and partial tensors: which, and where their values still are."""

from __future__ import annotations

import shlex
from collections.abc import Iterable

from converter.context import Context
from converter.diagnoses.faults import explanation, finding_of
from converter.diagnoses.model import LOST, Case, Diagnosis, Finding, folded


def _zero3_empty_tensors(case: Case, context: Context) -> Iterable[Finding]:
    faults = [f for f in case.survey.faults if f.code == "zero3-empty-tensors"]
    if not faults:
        return
    empty = tuple(n for n, info in case.shapes.items() if info.shape == (0,))
    places = case.training_near()
    recoverability, command = LOST, None
    if places:
        given = [] if not places[0].given and _is_inside(case, places[0].asked) else ["--weights-from", places[0].asked]
        recoverability = f"from {places[0].asked}"
        command = f"rlhf-convert repair {case.path} {case.out('fixed')} {shlex.join(given)}".rstrip()
    message = finding_of(faults[0], case).message
    yield Finding(
        "zero3-empty-tensors", "error", message, empty, folded(case, empty), recoverability, ("fill",), "safe", command
    )


def _is_inside(case: Case, asked: str) -> bool:
    return asked.startswith(f"{case.asked.rstrip('/')}/")


DIAGNOSES = (
    Diagnosis(
        "zero3-empty-tensors",
        _zero3_empty_tensors,
        frozenset({"model", "adapter"}),
        False,
        explanation("zero3-empty-tensors"),
    ),
)
