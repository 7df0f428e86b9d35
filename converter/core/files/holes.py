"""Space of a file that is given back to the file system; the digest of one that is wholly here."""

from __future__ import annotations

import errno
import functools
import hashlib
import os

_PUNCH_HOLE, _KEEP_SIZE = 2, 1
"""Source: https://github.com/torvalds/linux/blob/v6.6/include/uapi/linux/falloc.h"""


def punch(fd: int, offset: int, length: int) -> None:
    """`fallocate` with a hole.

    Raises:
        OSError: the file system, or the system, has no holes.
    """
    import ctypes

    try:
        fallocate = ctypes.CDLL(None, use_errno=True).fallocate
    except (OSError, AttributeError):
        raise OSError(errno.ENOSYS, "no fallocate") from None
    fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    if fallocate(fd, _PUNCH_HOLE | _KEEP_SIZE, offset, length):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def stretches(units: list[int]) -> list[tuple[int, int]]:
    """Runs of numbers that follow one another, as first and one past the last."""
    runs: list[tuple[int, int]] = []
    for unit in units:
        if runs and runs[-1][1] == unit:
            runs[-1] = (runs[-1][0], unit + 1)
        else:
            runs.append((unit, unit + 1))
    return runs


def sha256_of(path: str) -> str:
    """The digest of a local file, taken once as long as it stays as it is."""
    status = os.stat(path)
    return _sha256(path, status.st_size, status.st_mtime_ns, status.st_ino)


@functools.lru_cache(maxsize=256)
def _sha256(path: str, *_state: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
