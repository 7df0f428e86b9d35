"""Records of one tensor each inside a larger file, as torch's distributed checkpoints keep them, by the thousand.

Records of tensors of one shape are the same bytes, but for values and their checksums. The first of each kind is taken
apart and checked in full (`read_torch_member`); one that has its very bytes everywhere else is what that one was.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from converter.core.checkpoint import RecordCheck
from converter.core.files.opening import Identity, read_exact
from converter.core.formats.torch_file import TorchFile, read_torch_member
from converter.core.formats.zip_directory import value_checksum
from converter.core.tensors.dtypes import TensorInfo
from converter.core.tensors.nodes import Stored

_MOST_ALIKE = 16
_LONGEST = 16_384


@dataclass(frozen=True)
class Kind:
    """Records of one length.

    Attributes:
        head: bytes before the values, `tail`: those behind them.
        fixed: stretches of the tail that all have in common; between them are checksums and torch's own identity.
        crc: where in the tail the checksum of the values is.
    """

    info: TensorInfo
    head: bytes
    tail: bytes
    fixed: tuple[tuple[int, int], ...]
    crc: int

    @property
    def values(self) -> int:
        """Bytes of the values."""
        return self.info.nbytes

    def is_tail(self, tail: bytes) -> bool:
        """True for what may lie behind the values of another record of the kind."""
        return all(tail[a:b] == self.tail[a:b] for a, b in self.fixed)


class Members:
    """Records in one open file."""

    def __init__(self, fd: int, path: Path) -> None:
        self._fd, self._path = fd, path
        self._file = str(path.absolute())
        self._status = os.fstat(fd)
        self._identity = Identity.of(self._status)

    def read(self, start: int, length: int, kinds: dict[int, list[Kind]]) -> TorchFile:
        """What was saved in a stretch of the file.

        Args:
            kinds: of records that were read before, in this file or in others, by their length; it grows.

        Raises:
            Refused: see `read_torch_member`.
        """
        alike = kinds.setdefault(length, [])
        if alike and start + length <= self._status.st_size and (known := self._known(start, alike)) is not None:
            return known
        found = read_torch_member(self._fd, self._path, start=start, length=length)
        value = found.value
        if not isinstance(value, Stored) or value.offset < start:
            return found
        head = read_exact(self._fd, start, min(value.offset - start, _LONGEST), file=self._file)
        behind = value.offset + value.info.nbytes
        tail = read_exact(self._fd, behind, min(max(start + length - behind, 0), _LONGEST), file=self._file)
        if len(head) + value.info.nbytes + len(tail) != length:
            return found
        if len(alike) < _MOST_ALIKE and found.checks and (places := value_checksum(tail)) is not None:
            alike.append(Kind(value.info, head, tail, _between(places, len(tail)), places[0][0]))
        return TorchFile(value, found.checks, found.identity, _digest(head, tail))

    def _known(self, start: int, alike: list[Kind]) -> TorchFile | None:
        """A record that is of a kind that was read before, taken as that was."""
        head = b""
        for kind in alike:
            if len(head) < len(kind.head):
                head = read_exact(self._fd, start, len(kind.head), file=self._file)
            if not head.startswith(kind.head):
                continue
            at = start + len(kind.head)
            tail = read_exact(self._fd, at + kind.values, len(kind.tail), file=self._file)
            if kind.is_tail(tail):
                crc = int.from_bytes(tail[kind.crc : kind.crc + 4], "little")
                checks = (RecordCheck(self._file, at, kind.values, crc),) if crc or not kind.values else ()
                return TorchFile(Stored(kind.info, self._file, at), checks, self._identity, _digest(kind.head, tail))
        return None


def _between(places: list[tuple[int, int]], size: int) -> tuple[tuple[int, int], ...]:
    """What of the tail is left without some stretches."""
    found, at = [], 0
    for start, stop in [*sorted(places), (size, size)]:
        found.append((at, start))
        at = stop
    return tuple(found)


def _digest(head: bytes, tail: bytes) -> str:
    return hashlib.sha256(head + tail).hexdigest()
