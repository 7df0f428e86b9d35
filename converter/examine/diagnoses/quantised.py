"""Quantised weights that lack a part, or whose parts do not go together."""

from __future__ import annotations

from collections.abc import Iterable

from converter.converters.merge.quantised.dequantise import Dequantise
from converter.core.context import Context
from converter.diagnostic import Severity
from converter.errors import ConvertError
from converter.examine.diagnoses.case import LOST, Case, Finding, diagnosis
from converter.families.quantised.reading import odd_types, read
from converter.text import show


@diagnosis("quantised-incomplete", "model")
def quantised_incomplete(case: Case, context: Context) -> Iterable[Finding]:
    """A quantised weight without its scale, or with one of another shape or type: a file of several is missing, a save
    or a merge filtered or cast names, or one rank saved its own slices. Without the scale the weight is noise, and
    loaders may start with memory that nobody wrote. Under --deep what says how the weights are laid out is read too:
    shapes, block sizes, tables, zero points, the order of the inputs, a GPU's layout. Get the file again from where it
    was made; no other model has these scales.
    """
    found = read(case.shapes, case.config) if case.shapes else None
    if found is None:
        return
    for fault in found.faults:
        yield _finding(fault.text, fault.tensor)
    for names, text in odd_types(found, case.shapes).items():
        yield _finding(text, *names, severity="changes-numbers")
    if case.deep and found.weights and not found.faults and not found.unsupported:
        try:
            Dequantise()(case.checkpoint, Context())
        except ConvertError as error:
            if error.code == "quantised-incomplete":
                details = f", expected {error.expected}" if error.expected else ""
                of = [p for w, _ in found.weights if f"{show(w.name)}:" in error.what for p in w.parts.values()]
                yield _finding(error.what + details, *of)
            elif error.code == "quantised-unsupported":
                yield Finding(code="quantised-incomplete", severity="cosmetic", text=error.what, next=error.next)


def _finding(text: str, *names: str, severity: Severity = "error") -> Finding:
    return Finding(
        code="quantised-incomplete",
        severity=severity,
        text=text,
        tensors=names,
        evidence=(f"{show(names[0])} is in the file",) if names else (),
        recoverability=LOST,
    )
