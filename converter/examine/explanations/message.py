"""One message that a trainer prints, and what it means."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from converter.diagnostic import Diagnostic, Next, is_command, parts

_FIELD = re.compile(r"\{(\w+)\}")
_OPTIONAL = re.compile(r" \(\{(\w+)\}(?:, \.\.\.)?\)")


@dataclass(frozen=True, kw_only=True)
class Message(Diagnostic):
    """A text as trainers print it; `text` is what it means, in one to three sentences.

    `error`: the job fails or runs on random weights; `changes-numbers`: it runs on other numbers than were meant;
    `cosmetic`: harmless. In `next`, `DIR` stands for the user's folder.

    Attributes:
        keys: plain substrings; a line that holds none of them is not looked at, so logs of gigabytes are fast.
        pattern: what the line must match; its named groups may be used in `text` and `next`.
        codes: diagnoses that `explain CODE` knows more about.
        seen_in: where the text was found, as `PACKAGE VERSION: FILE`.
    """

    keys: tuple[str, ...]
    pattern: str
    codes: tuple[str, ...] = ()
    seen_in: tuple[str, ...] = ()

    @cached_property
    def regex(self) -> re.Pattern[str]:
        """The pattern, compiled; it is ours, never an input's."""
        return re.compile(self.pattern)

    @property
    def steps(self) -> tuple[Next, ...]:
        """What to do, one after the other: each command for itself, sentences with their commands."""
        if self.next is None:
            return ()
        return parts(self.next) if is_command(self.next) else (self.next,)

    @property
    def general(self) -> str:
        """What it means, without the names of a case."""
        return self.filled({})

    def filled(self, groups: Mapping[str, str]) -> str:
        """What it means, with the names of a case; what the line does not name is left out or called NAME."""
        text = _OPTIONAL.sub(lambda m: m[0] if m[1] in groups else "", self.text)
        return _FIELD.sub(lambda m: groups.get(m[1], {"name": "NAME"}.get(m[1], "...")), text)
