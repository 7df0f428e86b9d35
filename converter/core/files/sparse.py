"""Files of the Hub and of object stores that are here in part: sparse files, whose bytes are fetched before a read.

Whoever reads one does so inside `reading`, and never sees a hole. Only a bounded part of all of them is on the disk at
a time: what was not read for longest is punched out again. A file that is read whole and in order has its sha256
compared with the one that the Hub lists.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import os
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from converter.core.files import holes
from converter.core.files.origins import Fetch, Origin, fetch_parts
from converter.errors import Refused
from converter.text import show

UNIT = 16 * 1024
"""Bytes that are fetched or given back at once: a header of a shard of a 70B model has about 10 KB."""

BUDGET = 256_000_000
"""Bytes of weight files that are on the disk at a time."""

LARGEST_FETCH = 16 << 20
"""Bytes that are fetched at once, by several requests."""

T = TypeVar("T")


@dataclass
class Window:
    """How much is fetched ahead and kept.

    Attributes:
        ahead: bytes that one request fetches at least, while a file is read through; 0: what is asked for.
    """

    ahead: int = 0
    budget: int = BUDGET


class SparseFile:
    """One file of a repository.

    Attributes:
        origin: the file on the Hub, with the digest that it lists.
        is_whole: fetched in one piece and checked at once: what is small, or is read as text.
        is_copied: the Hub copied it whole by its digest; it did not have to come here.
        fetched: bytes that came so far.
        expect_same: refuses where the file is not what it was when it was listed, and no digest can tell.
    """

    def __init__(
        self,
        path: Path,
        size: int,
        fetch: Fetch,
        origin: Origin,
        *,
        is_whole: bool,
        expect_same: Callable[[], None] = lambda: None,
    ) -> None:
        self.path, self.size, self.origin, self.is_whole = path, size, origin, is_whole
        self.expect_same = expect_same
        self.is_copied = False
        self.fetched = 0
        self._fetch = fetch
        self._turn = threading.RLock()
        self._is_here = False
        self._hash = hashlib.sha256()
        self._hashed = 0
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        os.ftruncate(self._fd, size)

    @property
    def identity(self) -> tuple[int, int, int]:
        """Size, time and number that depend on nothing but the content."""
        return self.size, 0, int(self.digest[:15], 16)

    @property
    def digest(self) -> str:
        """What the Hub lists for its content."""
        return self.origin.digest

    @property
    def is_checked(self) -> bool | None:
        """True: every byte was read, and they are those that the Hub lists; None: not every byte was, or in order."""
        if self.origin.mark is not None:
            return None
        if self.is_whole:
            return True if self._is_here else None
        if self.origin.sha256 is None or self._hashed < self.size:
            return None
        return self._hash.hexdigest() == self.origin.sha256

    @contextlib.contextmanager
    def held(self, start: int, stop: int) -> Iterator[None]:
        """The bytes from `start` to `stop` are there, and stay until the block ends."""
        stop = min(stop, self.size)
        if start >= stop:
            yield
            return
        if self.is_whole:
            with self._turn, _noted():
                self._fetch_whole()
            yield
            return
        units = range(start // UNIT, -(-stop // UNIT))
        with _state:
            _pins.update((self, u) for u in units)
        try:
            with self._turn, _noted():
                self._fill(units)
                self._hash_on()
            yield
        finally:
            with _state:
                for unit in units:
                    _unpin(self, unit)

    def _fetch_whole(self) -> None:
        if self._is_here:
            return
        for _ in range(2):
            content = self._fetch(0, self.size)
            self.fetched += len(content)
            if len(content) == self.size and self.origin.lists(content):
                _write(self._fd, content, 0)
                self._is_here = True
                return
        raise corrupt(self.path.name)

    def _fill(self, units: range) -> None:
        """Fetch what is missing of these units, and what comes next where a file is read through."""
        with _state:
            missing = []
            for unit in units:
                if (self, unit) in _here:
                    _here.move_to_end((self, unit))
                else:
                    missing.append(unit)
        for first, last in holes.stretches(missing):
            for start in range(first, last, LARGEST_FETCH // UNIT):
                self._bring(start, min(start + LARGEST_FETCH // UNIT, last))

    def _bring(self, first: int, last: int) -> None:
        ahead = min(window.ahead, LARGEST_FETCH) // UNIT
        end = -(-self.size // UNIT)
        with _state:
            while last < end and last - first < ahead and (self, last) not in _here:
                last += 1
            _make_room((last - first) * UNIT)
        start, stop = first * UNIT, min(last * UNIT, self.size)
        fetch_parts(self._fetch, start, stop, functools.partial(_write, self._fd))
        with _state:
            self.fetched += stop - start
            _here.update(((self, u), None) for u in range(first, last))

    def _hash_on(self) -> None:
        """Take what follows the bytes that were hashed so far, as far as it is here."""
        while self._hashed < self.size:
            unit = self._hashed // UNIT
            with _state:
                if (self, unit) not in _here:
                    return
                _pins[self, unit] += 1
            try:
                block = os.pread(self._fd, UNIT, unit * UNIT)
            finally:
                with _state:
                    _unpin(self, unit)
            self._hash.update(block)
            self._hashed += len(block)

    def punch(self, first: int, last: int) -> None:
        """Give back the space of units that nobody holds."""
        try:
            holes.punch(self._fd, first * UNIT, (last - first) * UNIT)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            raise Refused(
                "hub-no-holes",
                "the file system can't give back parts of a file, so a model can't be read from the Hub in parts",
                where=show(self.path.parent),
                next="set TMPDIR to a folder on ext4, XFS, btrfs or tmpfs; or download it: hf download",
            ) from None

    def refetch(self) -> None:
        """Forget what came so far, but for what somebody holds: the next read asks the Hub again."""
        with self._turn, _state:
            units = sorted(u for f, u in _here if f is self and (self, u) not in _pins)
            for unit in units:
                del _here[self, unit]
            self._hash, self._hashed = hashlib.sha256(), 0
            for first, last in holes.stretches(units):
                self.punch(first, last)

    def close(self) -> None:
        """Forget the file; it is not removed."""
        os.close(self._fd)


@contextlib.contextmanager
def _noted() -> Iterator[None]:
    """A refusal is noted: who asked may take it for a fault of the file, as of one on the disk."""
    try:
        yield
    except Refused as error:
        lost.append(error)
        raise


lost: list[Refused] = []
"""Why bytes that were asked for did not come."""

window = Window()
folders: dict[str, str] = {}
"""Folders of sparse files, and what they are called on screens: `hf://owner/name@commit`."""

_state = threading.RLock()
_known: dict[tuple[int, int], SparseFile] = {}
_here: OrderedDict[tuple[SparseFile, int], None] = OrderedDict()
_pins: Counter[tuple[SparseFile, int]] = Counter()


def add(file: SparseFile) -> None:
    """From now on reads of this file fetch what they need."""
    status = os.stat(file.path)
    _known[status.st_dev, status.st_ino] = file


def forget_all() -> None:
    """Close every sparse file."""
    for file in _known.values():
        file.close()
    folders.clear()
    lost.clear()
    _known.clear()
    _here.clear()
    _pins.clear()


def known() -> list[SparseFile]:
    """Every sparse file, in the order in which they were added."""
    return list(_known.values())


def of(status: os.stat_result) -> SparseFile | None:
    """The sparse file that a `stat` is of."""
    return _known.get((status.st_dev, status.st_ino)) if _known else None


def at(path: str) -> SparseFile | None:
    """The sparse file of that path."""
    return of(os.stat(path)) if _known else None


def same_content(one: str, two: str) -> bool:
    """True for files with the same digest: two that the Hub lists, or one of them and one that is here.

    False where that is not known.
    """
    a, b = at(one), at(two)
    if a is not None and b is not None:
        return a.digest == b.digest
    remote, local = (a, two) if a is not None else (b, one)
    if remote is None or remote.origin.sha256 is None or os.stat(local).st_size != remote.size:
        return False
    return holes.sha256_of(local) == remote.origin.sha256  # cheaper than to bring as much


def as_typed(text: str) -> str:
    """A text for the user, in which files of the Hub are named as such."""
    for folder, name in folders.items():
        text = text.replace(folder, name)
    return text


@contextlib.contextmanager
def reading(fd: int, offset: int, length: int) -> Iterator[None]:
    """Bytes of a file are there until the block ends, wherever they come from."""
    file = of(os.fstat(fd)) if _known else None
    if file is None:
        yield
        return
    with file.held(offset, offset + length):
        yield


def piece(fd: int, length: int) -> int:
    """How much of `length` bytes to read at once: a part of the budget where they come from the Hub."""
    return length if not _known or of(os.fstat(fd)) is None else min(length, max(window.budget // 8, UNIT))


@contextlib.contextmanager
def reading_through(largest: int) -> Iterator[None]:
    """Files are read through: fetch ahead, and keep half of `largest` bytes on the disk, or a little more.

    Args:
        largest: bytes of the output's largest file; what is kept is a mebibyte at least and `BUDGET` at most.
    """
    before = window.ahead, window.budget
    window.budget = min(max(largest // 2, 1 << 20), BUDGET)
    window.ahead = min(window.budget // 8, LARGEST_FETCH)
    try:
        yield
    finally:
        window.ahead, window.budget = before


def check(path: str) -> None:
    """Compare the digest of a file that was read whole.

    Raises:
        Refused: it isn't the one that the Hub lists (`download-corrupt`); or the store has another object there now
            (`input-changed`).
    """
    file = at(path)
    if file is None:
        return
    if file.is_checked is False:
        raise corrupt(file.path.name)
    file.expect_same()


def read_again(path: Path, read: Callable[[], T]) -> T:
    """What is read of a file; where it seems broken and came in part, which no digest checks, from new bytes."""
    try:
        return read()
    except Refused:
        file = at(str(path)) if os.path.lexists(path) else None
        if file is None or file.is_whole or lost:
            raise
        file.refetch()
    return read()


def expect_all_read() -> None:
    """All that was asked of the Hub came: else what was found says nothing of the files.

    Raises:
        Refused: the first reason why it did not.
    """
    if lost:
        raise lost[0]


def corrupt(name: str) -> Refused:
    """The error for a file that came with other bytes than the Hub lists."""
    return Refused(
        "download-corrupt",
        f"{show(name)} came with other bytes than the Hub lists: its digest differs",
        next="run the same command again; if it fails again, suspect what lies between here and the Hub",
    )


def _write(fd: int, content: bytes, offset: int) -> None:
    view = memoryview(content)
    while view:
        count = os.pwrite(fd, view, offset)
        view, offset = view[count:], offset + count
    # When it was fetched says nothing of when it was made.
    os.utime(fd, (0, 0))


def _unpin(file: SparseFile, unit: int) -> None:
    _pins[file, unit] -= 1
    if not _pins[file, unit]:
        del _pins[file, unit]


def _make_room(wanted: int) -> None:
    """Punch out what was not read for longest, until `wanted` bytes fit; what is held stays."""
    excess = len(_here) + wanted // UNIT - window.budget // UNIT
    if excess <= 0:
        return
    gone: dict[SparseFile, list[int]] = {}
    for file, unit in [key for key in _here if key not in _pins][:excess]:
        del _here[file, unit]
        gone.setdefault(file, []).append(unit)
    for file, units in gone.items():
        for first, last in holes.stretches(sorted(units)):
            file.punch(first, last)
