"""Empty and partial tensors: which, and where their values still are."""

from __future__ import annotations

from collections.abc import Iterable

from converter.context import Context
from converter.diagnoses.faults import explanation, finding_of
from converter.diagnoses.heads import filling_command
from converter.diagnoses.model import LOST, Case, Diagnosis, Finding, folded


def _zero3_empty_tensors(case: Case, context: Context) -> Iterable[Finding]:
    faults = [f for f in case.survey.faults if f.code == "zero3-empty-tensors"]
    if not faults:
        return
    empty = tuple(n for n, info in case.shapes.items() if info.shape == (0,))
    places = case.training_near()
    recoverability = f"from {places[0].asked}" if places else LOST
    elsewhere = f"rlhf-convert repair {case.path} {case.out('fixed')} --weights-from DIR"
    command = filling_command(case) or elsewhere
    message = finding_of(faults[0], case).message
    yield Finding(
        "zero3-empty-tensors", "error", message, empty, folded(case, empty), recoverability, ("fill",), "safe", command
    )


DIAGNOSES = (
    Diagnosis(
        "zero3-empty-tensors",
        _zero3_empty_tensors,
        frozenset({"model", "adapter"}),
        False,
        explanation("zero3-empty-tensors"),
    ),
)
