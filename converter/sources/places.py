"""Where below the folder that a user named a trainer's state lies, and why it is that one."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_NUMBER = re.compile(r"\d+", re.ASCII)


@dataclass(frozen=True)
class Place:
    """A checkpoint's folder and why it is the one, in words."""

    folder: Path
    why: str


def by_number(folder: Path) -> tuple[list[int], str]:
    """Sorts `checkpoint-9` before `checkpoint-10`."""
    return [int(n) for n in _NUMBER.findall(folder.name)], folder.name
