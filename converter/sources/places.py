"""Where below the folder that a user named a trainer's state lies, and why it is that one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from converter.diagnostic import Again, Command
from converter.errors import UsageError
from converter.text import show

MOST_LISTED = 8
"""Folders that an error lists."""

_NUMBER = re.compile(r"\d+", re.ASCII)
_LIGHTNING = ("checkpoints", "lightning_logs")
_LIGHTNING_VERSION = re.compile(r"version_\d+", re.ASCII)
LIGHTNING_DEPTH = 3
"""Folders that Lightning puts between a run's top and its checkpoints: `lightning_logs/version_0/checkpoints`."""


@dataclass(frozen=True)
class Place:
    """A checkpoint's folder and why it is the one, in words."""

    folder: Path
    why: str


def by_number(folder: Path) -> tuple[list[int], str]:
    """Sorts `checkpoint-9` before `checkpoint-10`."""
    return [int(n) for n in _NUMBER.findall(folder.name)], folder.name


def lightning_folders(root: Path) -> list[Path]:
    """Lightning's own folders right below one, the newest version first."""
    try:
        below = [p for p in root.iterdir() if p.is_dir()]
    except OSError:
        return []
    versions = sorted((p for p in below if _LIGHTNING_VERSION.fullmatch(p.name)), key=by_number, reverse=True)
    return [*(p for p in below if p.name in _LIGHTNING), *versions]


def no_parts(source: str, asked: str, part: str) -> UsageError:
    """The error for a part of what holds one model."""
    what = f"--part {show(part)}: what {source} saved here is of one model, and has no parts"
    step = Again(leave_out=("--part",), otherwise=Command("gather", (asked, "OUT")))
    return UsageError("no-parts", what, where=show(asked), next=step)


def tagged(asked: str, tag: str) -> Again:
    """The user's command with a checkpoint's name."""
    return Again(("--tag", tag), otherwise=Command("gather", (asked, "OUT", "--tag", tag)))


def several_checkpoints(asked: str, steps: Sequence[Path]) -> UsageError:
    """The error for a run's folder where nothing says which of its checkpoints is meant."""
    listed = ", ".join(show(f"{asked.rstrip('/')}/{p.name}") for p in steps[-MOST_LISTED:])
    what = f"a run folder with {len(steps)} checkpoints; name one of them"
    next_command = tagged(asked, steps[-1].name)
    return UsageError("several-checkpoints", what, where=show(asked), expected=listed, next=next_command)


def several_parts(asked: str, parts: Sequence[Path]) -> UsageError:
    """The error for a folder with several models."""
    names = [p.name for p in parts]
    again = Again(("--part", names[0]), otherwise=Command("gather", (asked, "OUT", "--part", names[0])))
    return UsageError(
        "several-parts",
        f"{len(parts)} models are saved here; name one of them",
        where=show(asked),
        expected=", ".join(map(show, names[:MOST_LISTED])),
        offers=names,
        next=again,
    )
