"""What verbs share that read a trainer's state: where it lies, the base that its run records, the command to type."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

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
            first.got = error.what.replace("the adapter records", "the run records")
        elif error.code not in (*NEEDS_BASE, "base-not-found", "base-unknown"):
            raise
    raise first from None


def corrected(error: ConvertError, command: Sequence[str], *, role: str | None = None) -> None:
    """Set `next` to the user's own command with what it lacks; `command` is without that."""
    words = shlex.join(command)
    if error.code == "base-not-found":
        error.next = f"{words} --base {base_in(error)}"
    elif error.code in ("base-needed", "config-missing", "base-unknown"):
        error.next = f"{words} --base BASE"
    elif error.code == "several-parts" and (part := _part(error, role)) is not None:
        error.next = f"{words} --part {part}"
    elif error.code == "config-of-policy":
        error.next = f"{words} --base BASE, the model that the value model began with"
    elif error.code == "lora-alpha-unknown":
        error.next = f"{words} --lora-alpha N, with the N of the training script"
        error.next += ", and --rslora if it set use_rslora" if command[1] == "gather" else ""
    elif error.code == "no-parts":
        error.next = shlex.join(_without(command, "--part"))


def base_in(error: ConvertError) -> str:
    """The base that the error's own command names, else `BASE`."""
    return (error.next or "").rpartition("--base ")[2] or "BASE"


def _part(error: ConvertError, role: str | None) -> str | None:
    """The part that fits the role, of those offered; else the one that the error itself names."""
    offered = set(re.findall(r"\w+", error.expected or ""))
    fitting = next((w for w in _WORDS_OF_ROLE.get(role or "", ()) if w in offered), None)
    named = re.search(r"--part (\w+)", error.next or "")
    return fitting or (named[1] if named else None)


def _without(command: Sequence[str], option: str) -> list[str]:
    if option not in command:
        return list(command)
    at = list(command).index(option)
    return [*command[:at], *command[at + 2 :]]
