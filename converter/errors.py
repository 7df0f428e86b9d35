"""One taxonomy of errors: what is wrong, where, what was expected and found, and the command to type next.

Every error that a user can cause is a `ConvertError`; its `exit_code` is the process's exit code. Anything else that
escapes is a bug of ours (exit code 70).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, ClassVar

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
        next: str | None = None,
        consent: bool = False,
    ) -> None:
        super().__init__(what)
        self.code = code
        self.what = what
        self.where = where
        self.expected = expected
        self.got = got
        self.next = next
        self.consent = consent

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

    def to_json(self) -> dict[str, Any]:
        """The same four parts as a JSON object, for `--json`."""
        return {
            "code": self.code,
            "what": self.what,
            "where": self.where,
            "expected": self.expected,
            "got": self.got,
            "next": self.next,
            "consent": self.consent,
            "exit_code": self.exit_code,
        }


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

    def __init__(self, signal_number: int, what: str, *, next: str | None = None) -> None:
        super().__init__("interrupted", what, next=next)
        self.exit_code = 128 + signal_number  # type: ignore[misc]


def show(text: object, limit: int = 200) -> str:
    """A string that came from an input, made safe for a terminal and a log: one line, control characters escaped.

    Bidirectional overrides and unpaired surrogates are escaped too; text longer than `limit` is cut with `...`.
    """
    raw = str(text)
    cut = raw if len(raw) <= limit else raw[: max(limit - 3, 0)] + "..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in cut)


_NUMBER = re.compile(r"\d+")


def fold(names: Iterable[str], most: int = 3) -> str:
    """Names that differ in a number only, shown as one: `layers.{0..27}.mlp.up_proj`; at most `most` patterns."""
    patterns: dict[str, list[list[str]]] = {}
    for name in names:
        name = name.replace("\0", "\\x00")  # which stands for a number below
        patterns.setdefault(_NUMBER.sub("\0", name), []).append(_NUMBER.findall(name))
    shown = [_folded(pattern, numbers) for pattern, numbers in list(patterns.items())[:most]]
    rest = len(patterns) - len(shown)
    return ", ".join(shown) + (f" and {rest} more" if rest > 0 else "")


def _folded(pattern: str, numbers: list[list[str]]) -> str:
    """One pattern with its numbers: as they are written, a range where none is missing, else the first few."""
    pieces = pattern.split("\0")
    out = pieces[0]
    for position, piece in enumerate(pieces[1:]):
        values = sorted({n[position] for n in numbers}, key=lambda digits: (len(digits), digits))
        whole = len(values) > 1 and len(values[-1]) < 10 and int(values[-1]) - int(values[0]) == len(values) - 1
        if len(values) == 1:
            out += values[0]
        elif whole:
            out += f"{{{values[0]}..{values[-1]}}}"
        else:
            out += f"{{{','.join(values[:4])}{',..' if len(values) > 4 else ''}}}"
        out += piece
    return show(out)
