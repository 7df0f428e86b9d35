"""Values that no model has: what doctor finds of them under `--deep` is no all-clear here."""

from __future__ import annotations

from pathlib import Path

from converter.core.context import Context
from converter.core.files import sparse
from converter.core.writer.reporter import Reporter
from converter.diagnostic import Command, as_argument
from converter.examine.verify.check import Check, fails, holds, note
from converter.text import format_size

CODES = (
    "weights-wrapped", "quantisation-left", "quantised-incomplete", "nonfinite", "zero-tensors", "suspicious-values",
    "copied-tensors",
)  # fmt: skip
"""Diagnoses of values, and of what says how quantised ones are read."""


def check_values(folder: str, root: Path, reporter: Reporter) -> list[Check]:
    """A failure for each thing that is wrong with the values of a model, else how many were read.

    Of a model on the Hub they are not read, and that is noted.

    Args:
        reporter: hears of the values that are read.
    """
    from converter.examine.diagnoses.values import stored
    from converter.examine.doctor import DoctorRequest, case_of, diagnoses

    if any(root.is_relative_to(each) for each in sparse.folders):
        text = "the weights are on the Hub, and their values were not read"
        return [note("numbers", "values-unread", text)]
    case, context = case_of(DoctorRequest(folder, deep=True)), Context(heard=reporter.advance)
    if case.kind != "model":
        return []
    sizes = [tensor.info.nbytes for _, tensor in stored(case)]
    reporter.start(sum(sizes), 0)
    found = []
    for code in CODES:
        reporter.checking(code)
        found += [f for f in diagnoses()[code](case, context) if f.severity != "cosmetic"]
    again = Command("doctor", (as_argument(folder), "--deep"))
    if not found:
        read = f"{len(sizes)} tensors, {format_size(sum(sizes))}"
        return [holds("numbers", f"{read}: no NaN or infinity, no zeroed layer, no copy of another")]
    return [fails("numbers", f.code, f.text, again) for f in found]
