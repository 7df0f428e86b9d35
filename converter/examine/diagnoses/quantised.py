"""Quantised weights that lack a part, or whose parts do not go together."""

from __future__ import annotations

from collections.abc import Iterable

from converter.core.context import Context
from converter.examine.diagnoses.case import LOST, Case, Finding, diagnosis
from converter.families.quantised.reading import read
from converter.text import show


@diagnosis("quantised-incomplete", "model")
def quantised_incomplete(case: Case, context: Context) -> Iterable[Finding]:
    """A quantised weight without its scale, or with one of another shape: a file of several is missing, a save or a
    merge filtered names, or one rank saved its own slices. Without the scale the weight is noise, and loaders may start
    with memory that nobody wrote. Get the file again from where it was made; no other model has these scales.
    """
    for fault in read(case.shapes, case.config).faults if case.shapes else ():
        yield Finding(
            code="quantised-incomplete",
            severity="error",
            text=fault.text,
            tensors=(fault.tensor,),
            evidence=(f"{show(fault.tensor)} is in the file",),
            recoverability=LOST,
        )
