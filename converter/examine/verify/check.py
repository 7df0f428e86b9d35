"""What `verify` finds: checks, each of which holds, fails, or holds with something to know. Nothing is written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from converter.diagnostic import Diagnostic, Next, Severity, spelled

Outcome = Literal["holds", "note", "fails"]


@dataclass(frozen=True, kw_only=True)
class Check(Diagnostic):
    """One thing that was looked at; `text` is what was found, with numbers; the code is empty where it holds.

    Attributes:
        label: what was looked at, one word: `head`, `config`, `values`.
        outcome: `note`: it holds, and the user should know something.
    """

    label: str
    outcome: Outcome
    code: str = ""
    severity: Severity = "info"

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        found = {"label": self.label, "outcome": self.outcome, "text": self.text}
        return found | {k: v for k, v in (("code", self.code), ("next", spelled(self.next))) if v}


def holds(label: str, text: str) -> Check:
    """A check that holds."""
    return Check(label=label, outcome="holds", text=text)


def note(label: str, code: str, text: str, next: Next | None = None) -> Check:
    """A check that holds, with something to know."""
    return Check(label=label, outcome="note", text=text, code=code, next=next)


def fails(label: str, code: str, text: str, next: Next | None = None) -> Check:
    """A check that fails."""
    return Check(label=label, outcome="fails", text=text, code=code, next=next)


def failed(checks: Iterable[Check]) -> list[Check]:
    """Those that fail."""
    return [c for c in checks if c.outcome == "fails"]


def spread(values: Iterable[float]) -> float:
    """The distance between the largest and the smallest."""
    listed = list(values)
    return max(listed) - min(listed) if listed else 0.0


def plain(values: Mapping[str, list[float]]) -> list[float]:
    """All values of several batches, in order."""
    return [v for row in values.values() for v in row]
