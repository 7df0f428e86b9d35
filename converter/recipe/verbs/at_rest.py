"""Whether a checkpoint's folder is at rest: what is in it at a look, and whether anyone has a file of it open."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from converter.examine.diagnoses.training import TEMPORARY, UNFINISHED

_WRITING = os.O_WRONLY | os.O_RDWR

TRAINER_FIRST, TRAINER_LAST = "training_args.bin", "trainer_state.json"
"""transformers' Trainer writes the one with the weights, the other last.

Source: Trainer._save and Trainer._save_checkpoint of transformers 5.23.
"""


@dataclass(frozen=True)
class Look:
    """What a folder holds, links not followed: two looks are equal where nothing changed in between.

    Attributes:
        entries: path below the folder, size, and times of the last change of content and of the entry.
    """

    entries: tuple[tuple[str, int, int, int], ...]

    @property
    def digest(self) -> str:
        """A name of this state for a file."""
        return hashlib.sha256(repr(self.entries).encode("utf-8", "surrogateescape")).hexdigest()

    @property
    def is_empty(self) -> bool:
        """True where no file is there yet."""
        return not self.entries

    @property
    def has_temporary(self) -> bool:
        """True where a name says that a file is being written."""
        return any(TEMPORARY.fullmatch(part) for path, *_ in self.entries for part in path.split("/"))

    @property
    def lacks_its_last_file(self) -> bool:
        """True where a Trainer's checkpoint has begun and the file that it writes last is not there."""
        names = {path for path, *_ in self.entries}
        return TRAINER_FIRST in names and TRAINER_LAST not in names


def look(folder: Path) -> Look | None:
    """What is there; None where the folder went away."""
    entries: list[tuple[str, int, int, int]] = []

    def gone(error: OSError) -> None:
        raise error

    try:
        for below, _, files in os.walk(folder, onerror=gone):
            for name in files:
                path = os.path.join(below, name)
                stat = os.lstat(path)
                entries.append((os.path.relpath(path, folder), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns))
    except OSError:
        return None
    return Look(tuple(sorted(entries)))


def is_unfinished(name: str) -> bool:
    """True for names of folders that a save has not given their last name yet."""
    return UNFINISHED.fullmatch(name) is not None


def open_for_writing(folder: Path) -> bool:
    """True where a process of this machine that we may look at has a file in the folder open for writing.

    Where there is no /proc, and for writers on other machines, this knows nothing; sizes at rest have to do.
    """
    inside = os.path.realpath(folder) + os.sep
    try:
        processes = [p for p in os.listdir("/proc") if p.isdecimal()]
    except OSError:
        return False
    for process in processes:
        try:
            numbers = os.listdir(f"/proc/{process}/fd")
        except OSError:
            continue
        for number in numbers:
            try:
                if os.readlink(f"/proc/{process}/fd/{number}").startswith(inside) and _writes(process, number):
                    return True
            except OSError:
                continue
    return False


def _writes(process: str, number: str) -> bool:
    with open(f"/proc/{process}/fdinfo/{number}", encoding="ascii") as told:
        flags = next((line.split()[1] for line in told if line.startswith("flags:")), "0")
    return bool(int(flags, 8) & _WRITING)
