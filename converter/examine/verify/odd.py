"""Values that no model has: what doctor finds of them under `--deep` is no all-clear here."""

from __future__ import annotations

from pathlib import Path

from converter.core.context import Context
from converter.core.files import sparse
from converter.core.writer.reporter import Reporter
from converter.diagnostic import Command, as_argument
from converter.examine.verify.check import Check, fails

CODES = ("weights-wrapped", "quantised-incomplete", "nonfinite", "zero-tensors", "suspicious-values", "copied-tensors")
"""Diagnoses of values, and of what says how quantised ones are read."""


def check_values(folder: str, root: Path, reporter: Reporter) -> list[Check]:
    """A failure for each thing that is wrong with the values of a model; of one on the Hub they are not read.

    Args:
        reporter: hears of the values that are read.
    """
    from converter.examine.diagnoses.values import stored
    from converter.examine.doctor import DoctorRequest, case_of, diagnoses

    if any(root.is_relative_to(each) for each in sparse.folders):
        return []
    case, context = case_of(DoctorRequest(folder, deep=True)), Context(heard=reporter.advance)
    if case.kind != "model":
        return []
    reporter.start(sum(tensor.info.nbytes for _, tensor in stored(case)), 0)
    found = []
    for code in CODES:
        reporter.checking(code)
        found += [f for f in diagnoses()[code](case, context) if f.severity != "cosmetic"]
    again = Command("doctor", (as_argument(folder), "--deep"))
    return [fails("values", f.code, f.text, again) for f in found]
