"""Where below the folder that a user named a trainer's state lies, and why it is that one."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from converter.diagnostic import Again, Command
from converter.errors import UsageError
from converter.text import show

_NUMBER = re.compile(r"\d+", re.ASCII)


@dataclass(frozen=True)
class Place:
    """A checkpoint's folder and why it is the one, in words."""

    folder: Path
    why: str


def by_number(folder: Path) -> tuple[list[int], str]:
    """Sorts `checkpoint-9` before `checkpoint-10`."""
    return [int(n) for n in _NUMBER.findall(folder.name)], folder.name


def no_parts(source: str, asked: str, part: str) -> UsageError:
    """The error for a part of what holds one model."""
    what = f"--part {show(part)}: what {source} saved here is of one model, and has no parts"
    step = Again(leave_out=("--part",), otherwise=Command("gather", (asked, "OUT")))
    return UsageError("no-parts", what, where=show(asked), next=step)
