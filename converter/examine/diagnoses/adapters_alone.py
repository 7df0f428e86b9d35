"""Adapters by themselves: what their config and their layers say of each other, with a base or without one."""

from __future__ import annotations

import re
from collections.abc import Iterable

from converter.converters.merge.adapter_itself import (
    INCONSISTENT,
    UNTARGETED,
    Contradiction,
    contradictions,
    untargeted_text,
)
from converter.converters.merge.asked_modules import modules_untargeted
from converter.core.context import Context
from converter.diagnostic import Steps
from converter.examine.diagnoses.case import HERE, LOST, Case, Finding, diagnosis, folded
from converter.examine.diagnoses.siblings import from_siblings
from converter.families.factors import alternatives, factor_in_name, shared_names
from converter.families.words import PEFT_PREFIX, without_wrappers

_MODEL = "base_model."


def _found(case: Case, code: str) -> list[Contradiction]:
    def find(case: Case) -> list[Contradiction]:
        is_alone = case.base is None or case.base.kind != "model" or case.base.survey.error() is not None
        return [] if case.survey.error() else contradictions(case.shapes, case.adapter_config, alone=is_alone)

    return [each for each in case.once("contradictions", find) if each.code == code]


@diagnosis(INCONSISTENT, "adapter")
def adapter_inconsistent(case: Case, context: Context) -> Iterable[Finding]:
    """The adapter contradicts itself: a rank is not the one in adapter_config.json, one layer lacks a module that its
    like have, a tensor has another shape than the same module has in other layers, or holds whole numbers, or the
    trained prompt is not of the size that the config counts. A tensor was lost, cut, renamed or cast. PEFT draws what
    is missing anew, passes over what it has no place for, and says so in a warning at most.
    """
    for each in _found(case, INCONSISTENT):
        yield Finding(
            code=INCONSISTENT,
            severity="error",
            text=each.text,
            tensors=each.names,
            evidence=folded(case, each.names),
            recoverability=LOST,
            next=from_siblings(case, each.names),
        )


@diagnosis(UNTARGETED, "adapter")
def adapter_untargeted(case: Case, context: Context) -> Iterable[Finding]:
    """The adapter holds factors of modules that target_modules of its config does not name. PEFT makes no layers there,
    and passes over the factors without a word. Name the modules in target_modules of adapter_config.json, or
    all-linear; factors that are there by mistake come out of the file.
    """
    found = _found(case, UNTARGETED)
    if not found and case.base is not None and not case.survey.error():
        dimensions = {n: len(i.shape) for n, i in case.base.shapes.items()}
        lost = tuple(modules_untargeted(case.shapes, case.adapter_config, dimensions, case.base.config))
        found = [Contradiction(UNTARGETED, untargeted_text(lost), lost)] if lost else []
    for each in found:
        yield Finding(
            code=UNTARGETED,
            severity="error",
            text=each.text,
            tensors=each.names,
            evidence=folded(case, each.names),
            next=Steps(
                "name them in target_modules, if training had them there; ", case.command("inspect", "--tensors")
            ),
        )


@diagnosis("adapter-keys-named", "adapter")
def adapter_keys_named(case: Case, context: Context) -> Iterable[Finding]:
    """Keys hold the adapter's name (lora_A.default.weight) or wrappers (module., _orig_mod., base_model.model.
    twice), as they stand in a model's memory; PEFT's own files do not. PEFT finds none of them, and says nothing: the
    model answers as its base does. Here they are read rightly; a repaired folder has PEFT's names.
    """
    odd = tuple(
        n
        for n in case.shapes
        if n.removeprefix(_MODEL) not in shared_names()
        if re.search(rf"\.(?:{alternatives()})\.[^.]+\.weight$", n)
        or without_wrappers(n) != n
        or n.count(PEFT_PREFIX) > 1
        or not n.startswith(PEFT_PREFIX)
    )
    if odd and (len(odd) < len(case.shapes) or any(factor_in_name().match(n) for n in odd)):
        text = f"{len(odd)} of {len(case.shapes)} keys are not as PEFT writes them, and PEFT would ignore them silently"
        command = case.repair()
        yield Finding(
            code="adapter-keys-named",
            severity="error",
            text=text,
            tensors=odd,
            evidence=folded(case, odd),
            recoverability=HERE,
            fix=("fix-adapter-names",),
            applicability="safe",
            next=command,
        )
