"""A checkpoint's examination in one line: how bad it is, which findings, and what to do first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from converter.examine.diagnoses.case import SEVERITIES
from converter.text import fold, show

Word = Literal["sound", "not compared", "numbers", "error", "not examined"]
_WORDS: Mapping[str, Word] = {"error": "error", "changes-numbers": "numbers", "cosmetic": "sound"}
_MOST_TEXT = 160


@dataclass(frozen=True)
class Glance:
    """What a line says of one checkpoint.

    Attributes:
        folder: as the user would type it.
        word: how bad the worst finding is; a cosmetic one leaves a checkpoint sound, where it was compared with what
            a load asks for.
        bad: findings as bad as the limit or worse, as `doctor --json` prints them.
        line: the line; what comes from the input is escaped in it.
    """

    folder: str
    word: Word
    bad: tuple[Mapping[str, Any], ...]
    line: str


def glance_of(
    folder: str,
    findings: Sequence[Mapping[str, Any]],
    fail_on: str,
    *,
    failed: str | None = None,
    not_compared: str | None = None,
) -> Glance:
    """The line of findings that are sorted, the worst first.

    Args:
        fail_on: the least severity of `bad`.
        failed: why nothing is known; None where it was examined.
        not_compared: why names and shapes were not compared with what a load asks for; None where they were.
    """
    if failed is not None:
        return Glance(folder, "not examined", (), f"{show(folder)}: not examined: {show(failed)}")
    limit = SEVERITIES.index(fail_on)
    bad = tuple(f for f in findings if SEVERITIES.index(f["severity"]) <= limit)
    word: Word = _WORDS[findings[0]["severity"]] if findings else "sound"
    told = [f for f in findings if f["severity"] != "cosmetic"]
    if not told:
        codes = fold([str(f["code"]) for f in findings])
        listed = f" ({codes})" if codes else ""
        if not_compared:
            return Glance(folder, "not compared", bad, f"{show(folder)}: no finding{listed}; {show(not_compared)}")
        return Glance(folder, word, bad, f"{show(folder)}: sound{listed}")
    first, rest = told[0], [str(f["code"]) for f in told[1:]]
    text = str(first["message"])
    text = text if len(text) <= _MOST_TEXT else f"{text[: _MOST_TEXT - 1].rstrip()}…"
    saved = f"; recoverable: {first['recoverability']}" if first["recoverability"] else ""
    saved = "; lost" if first["recoverability"] == "lost" else saved
    more = f"; and {fold(rest)}" if rest else ""
    shown = "ERROR" if word == "error" else "NUMBERS"
    return Glance(folder, word, bad, f"{show(folder)}: {shown} {first['code']}: {text}{saved}{more}")
