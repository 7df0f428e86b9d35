"""One taxonomy of errors: what is wrong, where, what was expected and found, and the command to type next.

Every error that a user can cause is a `ConvertError`; its `exit_code` is the process's exit code. Anything else that
escapes is a bug of ours (exit code 70).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

from converter.diagnostic import Command, Diagnostic, Next, completed, spelled

EXIT_BUG = 70
"""Exit code of an unexpected exception (`EX_SOFTWARE` of sysexits.h)."""


class ConvertError(Exception):
    """A condition that the user can understand and act on.

    Attributes:
        code: stable kebab-case name of the condition; `--allow CODE` names it where `consent` is true.
        what: one sentence, in the field's words.
        where: the file, folder or tensor concerned.
        expected, got: what was promised and what was found.
        next: a command or an action, with the user's own paths.
        offers: values of which one has to be chosen, where that is what is wrong.
        facts: what another part of the program may act on, by name.
        consent: the user may go on by repeating the command with `--allow CODE`.
    """

    exit_code: ClassVar[int] = 3

    def __init__(
        self,
        code: str,
        what: str,
        *,
        where: str | None = None,
        expected: str | None = None,
        got: str | None = None,
        next: Next | None = None,
        consent: bool = False,
        offers: Iterable[str] = (),
        facts: Mapping[str, str | int] | None = None,
    ) -> None:
        super().__init__(what)
        self.code = code
        self.what = what
        self.where = where
        self.expected = expected
        self.got = got
        self.next = next
        self.consent = consent
        self.offers = tuple(offers)
        self.facts = dict(facts or {})

    def __str__(self) -> str:
        parts = [self.what if self.where is None else f"{self.where}: {self.what}"]
        if self.expected is not None:
            parts.append(f"expected {self.expected}")
        if self.got is not None:
            parts.append(f"got {self.got}")
        if self.next is not None:
            parts.append(f"Next: {self.next}")
        if self.consent:
            parts.append(f"To go on all the same: --allow {self.code}")
        return "\n  ".join(parts)

    def __reduce__(self) -> tuple[Any, ...]:
        """So that it comes whole out of another process."""
        return _again, (type(self), self.what, dict(self.__dict__))

    @property
    def diagnostic(self) -> Diagnostic:
        """The same as a value."""
        facts = (("expected", self.expected), ("got", self.got))
        evidence = tuple(f"{label} {text}" for label, text in facts if text)
        return Diagnostic(
            code=self.code,
            severity="error",
            text=self.what,
            where=self.where,
            evidence=evidence,
            next=self.next,
            facts=tuple(self.facts.items()),
        )

    def complete(self, command: Command, takes: Callable[[str], bool] = lambda _: True) -> None:
        """Put the command that the user typed where `next` means "the same command" (see `completed`)."""
        self.next = completed(self.next, command, takes)

    def to_json(self) -> dict[str, Any]:
        """The same four parts as a JSON object, for `--json`."""
        return {
            "code": self.code,
            "what": self.what,
            "where": self.where,
            "expected": self.expected,
            "got": self.got,
            "next": spelled(self.next),
            "consent": self.consent,
            "exit_code": self.exit_code,
        }


def _again(kind: type[ConvertError], what: str, state: dict[str, Any]) -> ConvertError:
    error = kind.__new__(kind, what)
    error.__dict__.update(state)
    return error


class UsageError(ConvertError):
    """The command line or the recipe is not one that can be run (exit code 2)."""

    exit_code = 2


class Refused(ConvertError):
    """Nothing was written, since what would be written may be wrong (exit code 3)."""

    exit_code = 3


class VerificationFailed(ConvertError):
    """Something was written and then found wrong; it was not published (exit code 4)."""

    exit_code = 4


class Interrupted(ConvertError):
    """A signal ended the run; `exit_code` is 128 plus the signal's number."""

    def __init__(self, signal_number: int, what: str, *, next: Next | None = None) -> None:
        super().__init__("interrupted", what, next=next)
        self.exit_code = 128 + signal_number  # type: ignore[misc]
