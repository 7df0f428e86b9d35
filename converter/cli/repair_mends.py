"""What `repair` mends beside lost tensors: the safe fixes of doctor's findings, and unsafe ones with consent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from converter.diagnoses.model import Finding
from converter.doctor import Asked, examine
from converter.recipe import Step

# In the order in which they have to run: names first, since the others look for names.
_ORDER = (
    "split-lora",
    "mend-names",
    "mend-adapter-names",
    "mend-ties",
    "mend-vocabulary",
    "mend-labels",
    "mend-pad-token",
    "mend-architecture",
    "mend-for-transformers-4",
)
_OF_THE_MERGE = frozenset(
    {"base-quantised", "tied-copies-differ", "vocab-mismatch", "adapter-field-unknown", "adapter-field-unsupported",
     "adapter-base-moved", "peft-type-unsupported", "peft-type-unmergeable"}
)  # fmt: skip
"""Errors of another folder, or of a merge: PEFT loads the adapter all the same."""

NEVER_FILLED = frozenset(
    {"quantisation-left", "remote-code-missing", "normaliser-broken", "output-embedding-missing", "head-reshaped",
     "head-named-otherwise", "names-of-a-trainer", "lora-alpha-zero", "lora-unmerged", "vocabulary-rows", "fsdp-flat",
     "config-unreadable", "adapter-config", "adapter-unmatched", "adapter-shape", "adapter-rank", "adapter-unexpected",
     "adapter-incomplete", "adapter-tokens", "adapter-bias", "adapter-pattern"}
)  # fmt: skip
"""Errors that are in the output too, whatever tensors are filled."""

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
    src: str, *, base: str | None, target: str | None, lora_alpha: float | None, allow: Sequence[str]
) -> Mends:
    """The steps for what doctor finds.

    Args:
        target: what `--for` says; `transformers@4` adds the old spellings.
        allow: codes that the user consented to.
    """
    findings = examine(Asked(src, base=base, target=target)).findings
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
    if target == "transformers@4":
        names["mend-for-transformers-4"] = None
    steps = tuple(Step(n, _fields(n, lora_alpha, base)) for n in _ORDER if n in names)
    unmended = [f for f in findings if f.severity == "error" and f.code not in codes and f.code not in _OF_THE_MERGE]
    return Mends(steps, tuple(codes), tuple(left), tuple(unmended))


def _needed(finding: Finding, known: Sequence[str], lora_alpha: float | None) -> str | None:
    """The consent without which a step is not run; None where it may run."""
    if finding.applicability != "unsafe":
        return None
    if "split-lora" in known:
        return None if lora_alpha is not None else "--lora-alpha N"
    return next((_CONSENTS[n] for n in known if n in _CONSENTS), finding.code)


def _fields(name: str, lora_alpha: float | None, base: str | None) -> dict[str, Any]:
    if name != "split-lora":
        return {}
    fields: dict[str, Any] = {"lora-alpha": lora_alpha}
    return fields | ({"base": "base"} if base is not None else {})
