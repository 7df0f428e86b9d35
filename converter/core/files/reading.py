"""Input files, opened once, read with `pread`, and checked to be what was planned. No mmap: a file that gets shorter
under a map kills the process without a message, and mapped pages make a memory promise untestable.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Self

from converter.core.files import sparse
from converter.core.files.checksums import crc32
from converter.core.files.opening import Identity, open_input
from converter.errors import Refused
from converter.text import show


class Sums:
    """CRC-32 of the stretches of a file that were read, each put together of the reads that followed one another."""

    def __init__(self) -> None:
        self._by_end: dict[int, tuple[int, int]] = {}
        self._lock = threading.Lock()

    def add(self, offset: int, content: memoryview) -> None:
        """Note a read; it lengthens the stretch that ends where it begins."""
        with self._lock:
            start, before = self._by_end.pop(offset, (offset, 0))
        found = crc32(content, before)
        with self._lock:
            self._by_end[offset + len(content)] = start, found

    def within(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """Stretches of a part of the file, in order, none over another: first byte, last, CRC-32."""
        found, at = [], start
        with self._lock:
            stretches = sorted((first, end, crc) for end, (first, crc) in self._by_end.items())
        for first, end, crc in stretches:
            if at <= first < end <= stop:
                found.append((first, end, crc))
                at = end
        return found


class InputFiles:
    """The files that a plan reads: one descriptor each, shared by all threads.

    Args:
        identities: what each was when it was planned.
        summed: files of which every read is summed up on its way; see `sums`.
    """

    def __init__(self, identities: Mapping[str, Identity], summed: Collection[str] = ()) -> None:
        self._identities = identities
        self._sums = {path: Sums() for path in summed}
        self._descriptors: dict[str, int] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        with self._lock:
            for fd in self._descriptors.values():
                os.close(fd)
            self._descriptors.clear()

    def descriptor(self, path: str) -> int:
        """A descriptor to read `path` with.

        Raises:
            Refused: the file is not the one that was planned (`input-changed`).
        """
        with self._lock:
            if path not in self._descriptors:
                fd = open_input(Path(path))
                self._descriptors[path] = fd
                self._compare(path, fd)
            return self._descriptors[path]

    def read_into(self, path: str, offset: int, buffer: bytearray | memoryview) -> None:
        """Fill `buffer` with the bytes of `path` from `offset`.

        Raises:
            Refused: the file ends before (`input-cut`).
        """
        fd = self.descriptor(path)
        view = memoryview(buffer)
        done = 0
        while done < len(view):
            length = sparse.piece(fd, len(view) - done)
            with sparse.reading(fd, offset + done, length):
                count = os.preadv(fd, [view[done : done + length]], offset + done)
            if count == 0:
                raise cut_short(path, offset + len(view))
            done += count
        if path in self._sums:
            self._sums[path].add(offset, view)

    def sums(self, path: str) -> Sums:
        """CRC-32 of what was read so far of a file."""
        return self._sums.get(path) or Sums()

    def check_unchanged(self) -> None:
        """Compare every planned file, read or not, with its identity in the plan.

        Raises:
            Refused: one was changed, replaced or removed meanwhile (`input-changed`), or came from the Hub with other
                bytes than it lists (`download-corrupt`).
        """
        for path in self._identities:
            fd = self._descriptors.get(path)
            if fd is not None:
                self._compare(path, fd)
            try:
                now = Identity.of(os.stat(path))
            except OSError as error:
                raise Refused(
                    "input-changed", f"the input is gone since the run began: {error.strerror}", where=show(path)
                ) from error
            self._expect(path, now)
            sparse.check(path)

    def _compare(self, path: str, fd: int) -> None:
        self._expect(path, Identity.of(os.fstat(fd)))

    def _expect(self, path: str, now: Identity) -> None:
        planned = self._identities.get(path)
        if planned is not None and planned != now:
            raise Refused(
                "input-changed",
                "the input was changed while it was being converted; nothing was published",
                where=show(path),
                expected=planned.describe(),
                got=now.describe(),
                next="run the same command again once nothing writes to the input",
            )


def cut_short(path: str, needed: int) -> Refused:
    """The error for a file that ends before byte `needed`."""
    return Refused(
        "input-cut",
        "the input became shorter while it was read; nothing was published",
        where=show(path),
        expected=f"at least {needed} bytes",
        next="run the same command again once nothing writes to the input",
    )
