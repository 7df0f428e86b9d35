"""A `.distcp` file that lies in the place of another's too. Nothing in it says whose it is; equal values do.

Two ranks' files hold pieces of the same tensors. Where all records of two are the same bytes at the same places, and
pieces of one tensor among them that are no single value again and again, one is a copy of the other.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from converter.core.checkpoint import RecordCheck
from converter.core.files.opening import open_input, read_exact
from converter.core.tensors.nodes import Stored
from converter.errors import Refused
from converter.text import show

_LEAST = 2
"""Pieces of one tensor each that two files must share to be called copies: a single one may be equal by itself."""
_LOOKED_AT = 65_536


@dataclass(frozen=True)
class Record:
    """A piece of a tensor in a file."""

    key: str
    value: Stored
    check: RecordCheck

    @property
    def place(self) -> tuple[int, int, int]:
        """Where its values lie, and their checksum."""
        return self.check.offset, self.check.length, self.check.crc


def expect_no_copies(folder: Path, records: Iterable[Record]) -> None:
    """Every file is its own.

    Raises:
        Refused: two are copies of each other (`dcp-record`).
    """
    files: dict[str, list[Record]] = {}
    for record in records:
        files.setdefault(record.value.file, []).append(record)
    alike: dict[tuple[tuple[int, int, int], ...], list[str]] = {}
    for file, own in files.items():
        alike.setdefault(tuple(sorted(r.place for r in own)), []).append(file)
    for group in alike.values():
        for one, other in combinations(group, 2):
            if _are_copies(folder, files[one], files[other]):
                names = f"{show(Path(one).name)} and {show(Path(other).name)}"
                what = f"{names} hold the same values for different pieces of the same tensors: one is a copy"
                raise Refused(
                    "dcp-record", f"{what} of the other, under its name", where=show(folder),
                    next="copy each file again from the node that wrote it",
                )  # fmt: skip


def _are_copies(folder: Path, one: list[Record], other: list[Record]) -> bool:
    keys = {(r.key, r.place) for r in other}
    shared = [r for r in one if (r.key, r.place) in keys]
    if len(shared) < _LEAST or Path(one[0].value.file).stat().st_size != Path(other[0].value.file).stat().st_size:
        return False
    fd = open_input(Path(one[0].value.file), root=folder)
    try:
        found = 0
        for record in shared:
            found += _varies(fd, record)
            if found == _LEAST:
                return True
    finally:
        os.close(fd)
    return False


def _varies(fd: int, record: Record) -> bool:
    """True where a piece's values, or the first of them, are not one value again and again."""
    size = record.value.info.dtype.bits // 8
    if size == 0:
        return False
    length = min(record.check.length, _LOOKED_AT) // size * size
    raw = read_exact(fd, record.value.offset, length, file=record.value.file)
    return raw != raw[:size] * (length // size)
