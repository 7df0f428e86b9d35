"""What `repair` fixes beside lost tensors: the safe fixes of doctor's findings, and unsafe ones with consent."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from converter.converters.heads.whole import CODES as WHOLE
from converter.core.context import Context
from converter.diagnostic import Again
from converter.errors import UsageError
from converter.examine.diagnoses.aims import is_transformers_4
from converter.examine.diagnoses.case import Case, Finding
from converter.examine.doctor import DoctorRequest, diagnoses, examine
from converter.families.disk_names import memory_form
from converter.families.implied import class_of
from converter.families.words import LORA_FACTOR_WORD, PEFT_PREFIX
from converter.recipe.recipe import Step
from converter.sources.hf.set_files import OF_THE_INDEX, find_sets
from converter.sources.survey import StoredTensor
from converter.text import show

CHOOSE = "choose-weights"
"""It runs before anything is filled: what is lost depends on the set of weight files that is taken."""

# In the order in which they have to run: names first, since the others look for names.
_ORDER = (
    CHOOSE,
    "split-lora",
    "fix-names",
    "fix-disk-names",
    "fix-adapter-names",
    "fix-ties",
    "fix-vocabulary",
    "fix-labels",
    "fix-pad-token",
    "fix-architecture",
    "fix-for-transformers-4",
)
_OF_THE_MERGE = frozenset(
    {"base-quantised", "tied-copies-differ", "vocab-mismatch", "adapter-field-unknown", "adapter-field-unsupported",
     "adapter-base-moved", "peft-type-unsupported", "peft-type-unmergeable"}
)  # fmt: skip
"""Errors of another folder, or of a merge: PEFT loads the adapter all the same."""

NEVER_FILLED = frozenset(
    {"quantisation-left", "remote-code-missing", "normaliser-broken", "output-embedding-missing", "head-reshaped",
     "head-named-otherwise", "names-of-a-trainer", "lora-alpha-zero", "vocabulary-rows", "fsdp-flat",
     "config-unreadable", "adapter-config", "adapter-unmatched", "adapter-shape", "adapter-rank", "adapter-unexpected",
     "adapter-incomplete", "adapter-tokens", "adapter-bias", "adapter-pattern", "tensors-unexpected"}
)  # fmt: skip
"""Errors that are in the output too, whatever tensors are filled."""

_CLEARING = frozenset({"fix-names", "fix-disk-names", "fix-architecture", "split-lora"})
_LORA = re.compile(rf"\.(?:{LORA_FACTOR_WORD})\b")
_PEFT = re.compile(rf"^{re.escape(PEFT_PREFIX)}")
_SAVED = re.compile(r"\.modules_to_save\.[^.]+\.")
LORA_ALPHA = "--lora-alpha N"
"""What is needed where no tensor records the alpha; a consent's code everywhere else."""

_CONSENTS = {"fix-vocabulary": "vocabulary-rows", "fix-ties": "untie"}


@dataclass(frozen=True)
class Fixes:
    """Steps that fix a folder.

    Attributes:
        codes: findings that the steps, or writing the files anew, fix.
        left: findings that a step would fix with consent, and the code to consent to.
        unfixed: errors that would be in the output as well.
        not_compared: why names and shapes were not compared with what a load asks for; empty where they were.
    """

    steps: tuple[Step, ...]
    codes: tuple[str, ...]
    left: tuple[tuple[str, str], ...]
    unfixed: tuple[Finding, ...] = ()
    not_compared: str = ""


def find_fixes(
    src: str,
    *,
    base: str | None,
    target: str | None,
    lora_alpha: float | None,
    allow: Sequence[str],
    weights: str | None = None,
    emit: str | None = None,
) -> Fixes:
    """The steps for what doctor finds.

    Args:
        target: what `--for` says; `transformers@4` adds the old spellings.
        allow: codes that the user consented to.
        weights: a file of the set of weight files to take, as `--set` says.
        emit: what to make of LoRA layers left in a full model: `merged` or `adapter`.

    Raises:
        UsageError: `emit` of a model without LoRA layers (`no-adapter`), or without alpha (`lora-alpha-unknown`).
    """
    report = examine(DoctorRequest(src, base=base, target=target))
    findings = report.findings
    names: dict[str, None] = {}
    codes: dict[str, None] = {}
    left: dict[str, str] = {}

    def note(finding: Finding) -> None:
        known = [n for n in finding.fix if n in _ORDER]
        if finding.applicability == "display-only" or (finding.fix and not known):
            return
        needed = _needed(finding, known, lora_alpha)
        if needed is not None and needed not in allow:
            left[finding.code] = needed
            return
        names.update(dict.fromkeys(known))
        codes[finding.code] = None

    for finding in findings:
        note(finding)
    if report.case.kind == "model" and not _CLEARING.isdisjoint(names):
        for finding in _behind_the_names(report.case, findings, lora="split-lora" in names):
            note(finding)
    if "fix-names" in names:
        names["fix-ties"] = None  # by the names that are stored no tie is seen
    if is_transformers_4(target):
        names["fix-for-transformers-4"] = None
        # Where nothing says how the old version writes it, the step says so: it was asked for.
        codes.update({f.code: None for f in findings if f.code == "rope-of-transformers-5"})
    root = report.case.root
    if stale := {f.code for f in findings} & OF_THE_INDEX:
        names[CHOOSE] = None
        codes.update(dict.fromkeys(sorted(stale)))
    if report.case.kind == "model" and (weights is not None or len(find_sets(root, report.case.names)) > 1):
        names[CHOOSE] = None
    if emit is not None:
        _expect_lora(names, left, show(src))
        if emit == "adapter":  # the other fixes are of a model
            names = {n: None for n in names if n in (CHOOSE, "split-lora")}
    given: dict[str, dict[str, Any]] = {"split-lora": {"lora-alpha": lora_alpha} | ({"base": "base"} if base else {})}
    given["split-lora"] |= {} if emit is None else {"emit": emit}
    if weights is not None:
        given[CHOOSE] = {"file": weights}
    steps = tuple(Step(n, given.get(n, {})) for n in _ORDER if n in names)
    passed = {*codes, *_OF_THE_MERGE, *(c for c in WHOLE if c in allow)}
    unfixed = [f for f in findings if f.severity == "error" and f.code not in passed]
    return Fixes(steps, tuple(codes), tuple(left.items()), tuple(unfixed), report.not_compared)


def _expect_lora(names: Mapping[str, None], left: Mapping[str, str], where: str) -> None:
    if "lora-unmerged" in left:
        what = "no tensor records lora_alpha, and the scale of the update depends on it"
        step = Again(("--lora-alpha", "N"))
        raise UsageError("lora-alpha-unknown", what, where=where, next=step)
    if "split-lora" not in names:
        raise UsageError("no-adapter", "there are no LoRA layers in this model to split off", where=where)


def _behind_the_names(case: Case, findings: Sequence[Finding], *, lora: bool) -> list[Finding]:
    """Faults that only show once names and the class are fixed: a head behind a wrapper is no head to doctor."""
    entries = _fixed(case, lora=lora)
    named = case.config.get("architectures")
    bare = class_of(case.config)
    listed = {"architectures": [bare, *named[1:]]} if isinstance(named, list) and bare is not None else {}
    config = {**case.config, **listed}
    fixed = case.changed(entries, config)
    known = {f.code for f in findings}
    found = [f for each in diagnoses().values() for f in each(fixed, Context())]
    return [f for f in found if f.code not in known]


def _fixed(case: Case, *, lora: bool) -> dict[str, StoredTensor]:
    """The tensors by the names that they will have; without LoRA's, where those are merged."""
    names = case.plain.names
    form = memory_form({n: case.survey.entries[raw].tensor for raw, n in names.items()}, case.config)
    renamed = {} if form is None else form.renamed
    found = {renamed.get(n, n): case.survey.entries[raw] for raw, n in names.items()}
    if not lora:
        return found
    merged = {n: e for n, e in found.items() if _LORA.search(n) is None and ".original_module." not in n}
    return {_SAVED.sub(".", _PEFT.sub("", n).replace(".base_layer.", ".")): e for n, e in merged.items()}


def _needed(finding: Finding, known: Sequence[str], lora_alpha: float | None) -> str | None:
    """The consent without which a step is not run; None where it may run."""
    if finding.applicability != "unsafe":
        return None
    if "split-lora" in known:
        return None if lora_alpha is not None else LORA_ALPHA
    return next((_CONSENTS[n] for n in known if n in _CONSENTS), finding.code)
