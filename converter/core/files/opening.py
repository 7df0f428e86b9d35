"""Input files: one function opens them, one reads them. Regular files only, and none outside the folder asked for."""

from __future__ import annotations

import errno
import os
import resource
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from converter.core.files import links, sparse
from converter.errors import Refused
from converter.text import show


@dataclass(frozen=True, slots=True)
class Identity:
    """What tells one state of a file from another: size in bytes, modification time in ns, inode number."""

    size: int
    mtime_ns: int
    inode: int

    @classmethod
    def of(cls, status: os.stat_result) -> Self:
        """The identity that a `stat` shows; of a file of the Hub, what depends on its content alone."""
        remote = sparse.of(status)
        if remote is not None:
            return cls(*remote.identity)
        return cls(status.st_size, status.st_mtime_ns, status.st_ino)

    def to_json(self) -> list[int]:
        """`[size, mtime_ns, inode]`."""
        return [self.size, self.mtime_ns, self.inode]

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """The inverse of `to_json`."""
        size, mtime_ns, inode = value
        return cls(int(size), int(mtime_ns), int(inode))

    def describe(self) -> str:
        """For messages: size and a time stamp."""
        return f"{self.size} bytes, modified at {self.mtime_ns // 10**9}"


def open_input(path: Path, *, root: Path | None = None) -> int:
    """A descriptor to read a regular file with; the caller closes it.

    Args:
        root: the folder that the file must lie in once symbolic links are followed. In a Hub cache snapshot
            (`models--x--y/snapshots/REV`) links may lead to the cache's `blobs`, and links that this tool made and
            recorded in the folder's receipt to the files they were made for. None: links are followed anywhere.

    Raises:
        Refused: missing (`input-missing`), not a regular file (`input-not-a-file`), outside `root` (`input-outside`),
            another file than was linked (`link-changed`), or not readable (`input-unreadable`).
    """
    real, link = (path, None) if root is None else _inside(path, root)
    try:
        # Looked at before it is opened: opening a device can have effects. Looked at again, since it may have changed.
        _expect_regular(path, os.stat(real).st_mode)
        fd = _opened(real)
    except OSError as error:
        raise _unreadable(path, error) from error
    try:
        _expect_regular(path, os.fstat(fd).st_mode)
        if link is not None and not links.is_as_recorded(fd, link):
            raise _changed_link(path, real)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _opened(real: Path) -> int:
    """A descriptor; a process that may hold no more of them takes what the system lets it have, and tries again.

    A plan reads from every rank's file, and 1024 descriptors are what most systems give a process to begin with.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
    try:
        return os.open(real, flags)
    except OSError as error:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if error.errno != errno.EMFILE or soft == hard:
            raise
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (OSError, ValueError):  # where the hard limit is none, as on macOS
            raise error from None
        return os.open(real, flags)


def _expect_regular(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise Refused("input-not-a-file", f"not a regular file, but {_kind(mode)}", where=show(path))


def _kind(mode: int) -> str:
    kinds = {
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a pipe",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
        stat.S_IFSOCK: "a socket",
    }
    return kinds.get(stat.S_IFMT(mode), "something else")


def _unreadable(path: Path, error: OSError) -> Refused:
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        dangling = " (a symbolic link that leads nowhere)" if path.is_symlink() else ""
        return Refused("input-missing", f"the file is missing{dangling}", where=show(path))
    if error.errno == errno.ELOOP:
        return Refused("input-outside", "symbolic links lead in a circle", where=show(path))
    return Refused("input-unreadable", f"the file can't be opened: {error.strerror}", where=show(path))


def _changed_link(path: Path, real: Path) -> Refused:
    return Refused(
        "link-changed",
        "the file is a link to one of the source's, which is not the one that was there when the link was made",
        where=show(path),
        got=show(real),
        next="convert the source again, without --link-unchanged if it is not to be kept as it is",
    )


def _inside(path: Path, root: Path) -> tuple[Path, dict[str, Any] | None]:
    """Where the file really is, and what the folder's receipt says of it where it is a link that leaves the folder.

    Raises:
        Refused: not below `root`, nor where its links may lead (`input-outside`).
    """
    if _is_plainly_inside(path, root):
        return path, None
    try:
        real, real_root = path.resolve(), root.resolve()
    except (OSError, RuntimeError) as error:  # RuntimeError: how Python before 3.13 reports a circle of links
        raise Refused("input-outside", "symbolic links lead in a circle", where=show(path)) from error
    if not any(folder in real.parents for folder in (real_root, *_blob_folders(real_root))):
        link = links.recorded(os.path.relpath(path, root), real_root) if path.suffix == ".safetensors" else None
        if link is not None:
            return real, link
        raise Refused(
            "input-outside",
            "the file is a symbolic link that leaves its folder",
            where=show(path),
            got=show(real),
            next="copy the file itself into the folder",
        )
    return real, None


def _is_plainly_inside(path: Path, root: Path) -> bool:
    """Whether no link and no `..` stands between the folder and the file: then it lies inside, wherever that is.

    Following all links of both from the top of the file system asks for each folder on the way.
    """
    at, whole = os.fspath(root), os.fspath(path)
    if not whole.startswith(f"{at}{os.sep}"):
        return False
    for name in whole[len(at) + 1 :].split(os.sep):
        at = f"{at}{os.sep}{name}"
        try:
            if name == os.pardir or stat.S_ISLNK(os.lstat(at).st_mode):
                return False
        except OSError:
            return False
    return True


def _blob_folders(real_root: Path) -> tuple[Path, ...]:
    """Where files of a Hub cache snapshot may really be: the repository's blobs, and those that the cache shares.

    Source: https://github.com/huggingface/huggingface_hub/blob/v2.4.0/src/huggingface_hub/utils/_shared_blobs.py
    """
    for folder in (real_root, *real_root.parents):
        repository = folder.parent.parent
        if folder.parent.name == "snapshots" and repository.name.startswith("models--"):
            return ((repository / "blobs").resolve(), (repository.parent / "blobs").resolve())
    return ()


def identity(path: Path | str) -> Identity:
    """The identity of a file now."""
    return Identity.of(os.stat(path))


def pread(fd: int, length: int, offset: int) -> bytes:
    """`os.pread` of an input, whose bytes are fetched first where it lies on the Hub."""
    with sparse.reading(fd, offset, length):
        return os.pread(fd, length, offset)


def read_exact(fd: int, offset: int, length: int, *, file: str) -> bytes:
    """`length` bytes from `offset`.

    Raises:
        Refused: the file ends before (`input-cut`).
    """
    parts: list[bytes] = []
    done = 0
    while done < length:
        part = pread(fd, sparse.piece(fd, length - done), offset + done)
        if not part:
            raise Refused(
                "input-cut",
                "the file is shorter than it should be",
                where=show(file),
                expected=f"at least {offset + length} bytes",
                got=f"{os.fstat(fd).st_size} bytes",
            )
        parts.append(part)
        done += len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def read_limited(path: Path, *, limit: int, root: Path | None = None) -> bytes:
    """A small file whole.

    Raises:
        Refused: larger than `limit` bytes (`input-too-large`), or not to be opened (see `open_input`).
    """
    fd = open_input(path, root=root)
    try:
        size = os.fstat(fd).st_size
        if size > limit:
            raise Refused(
                "input-too-large", f"the file has {size} bytes", where=show(path), expected=f"at most {limit} bytes"
            )
        return read_exact(fd, 0, size, file=str(path))
    finally:
        os.close(fd)
