"""What `repair` mends beside lost tensors: the safe fixes of doctor's findings, and unsafe ones with consent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from converter.diagnoses.aims import is_transformers_4
from converter.diagnoses.model import Finding
from converter.doctor import Asked, examine
from converter.recipe import Step
from converter.sources.set_files import OF_THE_INDEX, find_sets

CHOOSE = "choose-weights"
"""It runs before anything is filled: what is lost depends on the set of weight files that is taken."""

# In the order in which they have to run: names first, since the others look for names.
_ORDER = (
    CHOOSE,
    "split-lora",
    "mend-names",
    "mend-disk-names",
    "mend-adapter-names",
    "mend-ties",
    "mend-vocabulary",
    "mend-labels",
    "mend-pad-token",
    "mend-architecture",
    "mend-for-transformers-4",
)
_OF_THE_BASE = frozenset({"base-quantised", "tied-copies-differ"})
"""Errors of another folder than the one that is mended."""

_CONSENTS = {"mend-vocabulary": "vocabulary-rows", "mend-ties": "untie"}


@dataclass(frozen=True)
class Mends:
    """Steps that mend a folder.

    Attributes:
        codes: findings that the steps, or writing the files anew, mend.
        left: findings that a step would mend with consent, and the code to consent to.
        unmended: errors that would be in the output as well.
    """

    steps: tuple[Step, ...]
    codes: tuple[str, ...]
    left: tuple[tuple[str, str], ...]
    unmended: tuple[Finding, ...] = ()


def find_mends(
    src: str,
    *,
    base: str | None,
    target: str | None,
    lora_alpha: float | None,
    allow: Sequence[str],
    weights: str | None = None,
) -> Mends:
    """The steps for what doctor finds.

    Args:
        target: what `--for` says; `transformers@4` adds the old spellings.
        allow: codes that the user consented to.
        weights: a file of the set of weight files to take, as `--set` says.
    """
    report = examine(Asked(src, base=base, target=target))
    findings = report.findings
    names: dict[str, None] = {}
    codes: dict[str, None] = {}
    left: list[tuple[str, str]] = []
    for finding in findings:
        known = [n for n in finding.fix if n in _ORDER]
        if finding.applicability == "display-only" or (finding.fix and not known):
            continue
        needed = _needed(finding, known, lora_alpha)
        if needed is not None and needed not in allow:
            left.append((finding.code, needed))
            continue
        names.update(dict.fromkeys(known))
        codes[finding.code] = None
    if is_transformers_4(target):
        names["mend-for-transformers-4"] = None
        # Where nothing says how the old version writes it, the step says so: it was asked for.
        codes.update({f.code: None for f in findings if f.code == "rope-of-transformers-5"})
    root = report.case.root
    if stale := {f.code for f in findings} & OF_THE_INDEX:
        names[CHOOSE] = None
        codes.update(dict.fromkeys(sorted(stale)))
    if report.case.kind == "model" and (weights is not None or len(find_sets(root, report.case.names)) > 1):
        names[CHOOSE] = None
    given: dict[str, dict[str, Any]] = {"split-lora": {"lora-alpha": lora_alpha} | ({"base": "base"} if base else {})}
    if weights is not None:
        given[CHOOSE] = {"file": weights}
    steps = tuple(Step(n, given.get(n, {})) for n in _ORDER if n in names)
    unmended = [f for f in findings if f.severity == "error" and f.code not in codes and f.code not in _OF_THE_BASE]
    return Mends(steps, tuple(codes), tuple(left), tuple(unmended))


def _needed(finding: Finding, known: Sequence[str], lora_alpha: float | None) -> str | None:
    """The consent without which a step is not run; None where it may run."""
    if finding.applicability != "unsafe":
        return None
    if "split-lora" in known:
        return None if lora_alpha is not None else "--lora-alpha N"
    return next((_CONSENTS[n] for n in known if n in _CONSENTS), finding.code)
