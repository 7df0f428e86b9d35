"""Which folders of a run must not be rotated away: sole copies, and the last checkpoint that can be used.

A trainer with a limit removes the oldest checkpoints first, whether or not the newer ones can be loaded; and shards
look like a resume state that can go, while the weights beside them are empty.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from converter.examine.diagnoses.case import LOST


@dataclass(frozen=True)
class Keep:
    """A folder that must stay.

    Attributes:
        path: as the user would type it.
        why: what would be lost with it.
    """

    path: str
    why: str


@dataclass(frozen=True)
class Remembered:
    """What one examination said that rotation has to know.

    Attributes:
        usable: no error was found, or all that is missing is in a file at hand.
        sole: folders that may hold the only copy of something that the checkpoint lacks, seen from the run's folder.
    """

    usable: bool
    sole: tuple[str, ...] = ()

    @classmethod
    def of(cls, findings: Iterable[Mapping[str, Any]], failed: str | None, run: str) -> Remembered:
        """From findings as `doctor --json` prints them; an error that names no place to recover from is taken for a
        loss, so that an older checkpoint is kept.

        Args:
            run: the run's folder, as the paths in the findings begin.
        """
        told = list(findings)
        errors = [f for f in told if f["severity"] == "error"]
        sole = tuple(os.path.relpath(path, run) for f in told if f["code"] == "sole-copy" for path in f["evidence"])
        return cls(failed is None and all(f["recoverability"] not in ("", LOST) for f in errors), sole)


def folders_to_keep(run: str, checkpoints: Sequence[tuple[str, Remembered]]) -> tuple[Keep, ...]:
    """Folders that must stay while these checkpoints are there; none for the newest, which no rotation removes.

    Args:
        run: the run's folder, as the user would type it.
        checkpoints: name and what is remembered, the oldest first.
    """
    kept = {sole: f"perhaps the sole copy of what {name} lacks" for name, each in checkpoints for sole in each.sole}
    usable = [name for name, each in checkpoints if each.usable]
    newest = checkpoints[-1][0] if checkpoints else None
    if usable and usable[-1] != newest:
        kept[usable[-1]] = f"the newest checkpoint that can be used; {newest} lost weights"
    return tuple(Keep(os.path.normpath(os.path.join(run, name)), why) for name, why in kept.items())
