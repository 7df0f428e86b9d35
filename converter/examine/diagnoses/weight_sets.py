"""Several sets of weight files in one folder, of which loaders read one that is not the model."""

from __future__ import annotations

from collections.abc import Iterable

from converter.core.context import Context
from converter.examine.diagnoses.case import HERE, MAX_EVIDENCE, Case, Finding, diagnosis
from converter.families.coverage import judged
from converter.sources.hf.set_files import CODE


@diagnosis(CODE, "model")
def weight_sets(case: Case, context: Context) -> Iterable[Finding]:
    """Several sets of weight files lie in the folder (model.safetensors and shards, shards of two totals, an index of
    one set beside another, pickles), and the one that loaders read is cut short, lacks files or tensors, or is of
    another model; or one tensor is in two files. `repair` takes the set that alone has every tensor that config.json
    implies, in its shape, once; deletes nothing; and refuses where two do with different values, or none does.
    """
    for fault in case.survey.faults:
        if fault.code != CODE:
            continue
        sets = judged(case.survey.sets, case.config)
        whole = [s for s in sets if not s.lacks]
        lines = tuple(s.words for s in whole)[:MAX_EVIDENCE]
        if not whole:
            yield Finding(
                code=CODE,
                severity="error",
                text=fault.text,
                evidence=lines,
                recoverability="from another copy of the files",
            )
            continue
        command = case.repair()
        yield Finding(
            code=CODE,
            severity="error",
            text=fault.text,
            evidence=lines,
            recoverability=HERE,
            fix=("choose-weights",),
            applicability="safe",
            next=command,
        )
