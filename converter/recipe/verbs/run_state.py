"""What verbs share that read a trainer's state: where it lies, the base that its run records, what a role means."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from converter.diagnostic import Again
from converter.errors import ConvertError

if TYPE_CHECKING:
    from converter.sources.places import Place

T = TypeVar("T")

NEEDS_BASE = frozenset({"base-needed", "config-missing", "head-base-lost"})
"""Refusals that a base model may answer."""

_WORDS_OF_ROLE = {"actor": ("actor", "policy"), "critic": ("critic", "value"), "reward": ("reward", "value", "critic")}


def place_of(root: Path, asked: str, *, tag: str | None, part: str | None) -> tuple[Place, str | None]:
    """The state that is meant, and the part inside of it, where parts are not folders but names of tensors.

    Raises:
        UsageError: see `find_place`.
    """
    from converter.sources.finding import find_place

    try:
        return find_place(root, asked, tag=tag, part=part), None
    except ConvertError as error:
        if error.code != "no-parts":
            raise
    # The names of the tensors may tell parts apart; the converter `gather` looks at those, and refuses if not.
    return find_place(root, asked, tag=tag), part


def with_recorded_base(attempt: Callable[[bool], T], *, given: bool) -> T:
    """The attempt, and where only a base is missing, another with the one that the run's adapter config records.

    Args:
        attempt: called with whether to take the recorded base; refuses before anything is written.
        given: the user named a base.

    Raises:
        ConvertError: the first refusal, with what became of the recorded base.
    """
    try:
        return attempt(False)
    except ConvertError as error:
        if given or error.code not in NEEDS_BASE:
            raise
        first = error
    try:
        return attempt(True)
    except ConvertError as error:
        if error.code == "base-not-found" and first.got is None:
            first.got, first.next = error.what, error.next
        elif error.code not in (*NEEDS_BASE, "base-not-found", "base-unknown"):
            raise
    raise first from None


def for_role(error: ConvertError, role: str) -> None:
    """Where one of several parts has to be named, name the one that fits the role."""
    fitting = next((w for w in _WORDS_OF_ROLE.get(role, ()) if w in error.offers), None)
    if error.code == "several-parts" and fitting is not None:
        error.next = Again(("--part", fitting))
