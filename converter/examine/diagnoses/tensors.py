"""Empty and partial tensors: which, and where their values still are."""

from __future__ import annotations

import re
from collections.abc import Iterable

from converter.converters.heads.whole import MISSING
from converter.core.context import Context
from converter.examine.diagnoses.case import LOST, Case, Diagnosis, Finding, diagnosis, folded
from converter.examine.diagnoses.commands import filling_command
from converter.examine.diagnoses.faults import explanation, finding_of
from converter.examine.diagnoses.siblings import from_siblings
from converter.examine.diagnoses.whole import judgement_of
from converter.text import fold, show

_LAYER = re.compile(r"(?P<stack>(?:[A-Za-z_]\w*\.)*?(?:layers?|h|blocks?))\.(?P<number>\d{1,6})\.", re.ASCII)
_NUMBERED = re.compile(r"\.\d+\.", re.ASCII)
_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_COUNTS_PASSES = frozenset({"hrm_text"})
"""Model types whose num_hidden_layers counts passes through layers that are fewer.

Source: HrmTextConfig of transformers 5.23.
"""


def _zero3_empty_tensors(case: Case, context: Context) -> Iterable[Finding]:
    faults = [f for f in case.survey.faults if f.code == "zero3-empty-tensors"]
    if not faults:
        return
    empty = tuple(n for n, info in case.shapes.items() if info.shape == (0,))
    places = case.training_near()
    recoverability = f"from {places[0].asked}" if places else LOST
    command = filling_command(case) or from_siblings(case, empty)
    message = finding_of(faults[0], case).text
    yield Finding(
        code="zero3-empty-tensors",
        severity="error",
        text=message,
        tensors=empty,
        evidence=folded(case, empty),
        recoverability=recoverability,
        fix=("fill",),
        applicability="safe",
        next=command,
    )


@diagnosis("layers-missing", "model")
def layers_missing(case: Case, context: Context) -> Iterable[Finding]:
    """Whole layers are in no file: fewer are there than config.json says. A save from one stage of a pipeline, a copy
    of some of the files with an index made anew, or a filter that went too far.
    Loaders make the missing layers RANDOM and list them among `newly initialized`. A model that was cut to fewer layers
    on purpose needs their number in its config.
    """
    if any(f.code in ("shard-missing", "index-phantom", "weights-missing") for f in case.survey.faults):
        return
    if any("_flat_param" in name for name in case.shapes):
        return  # they are inside of it
    said = next((n for k in _COUNTS if isinstance(n := case.text_config.get(k), int) and n > 0), None)
    if said is None or not case.shapes or str(case.text_config.get("model_type")) in _COUNTS_PASSES:
        return
    stacks: dict[str, set[int]] = {}
    for name in case.plain.names.values():
        if match := _LAYER.match(name):
            stacks.setdefault(match["stack"], set()).add(int(match["number"]))
    if not stacks and any(map(_NUMBERED.search, case.shapes)):
        return  # layers by other names, or shared ones
    deepest = max(stacks, key=lambda s: len(stacks[s]), default="")
    there = stacks.get(deepest, set())
    if len(there) < said:
        text = f"config.json says {said} layers, and {len(there)} are here: loaders make the others RANDOM"
        shown = (f"{show(deepest)}: {fold(sorted(map(str, there)))}",) if there else ()
        lost = () if (found := judgement_of(case)) is None else found.names(MISSING)
        inside = tuple(n for n in lost if (m := _LAYER.match(n)) and int(m["number"]) not in there)
        yield Finding(
            code="layers-missing", severity="error", text=text, tensors=inside, evidence=shown, recoverability=LOST
        )


DIAGNOSES = (
    layers_missing,
    Diagnosis(
        "zero3-empty-tensors",
        _zero3_empty_tensors,
        frozenset({"model", "adapter"}),
        False,
        explanation("zero3-empty-tensors"),
    ),
)
