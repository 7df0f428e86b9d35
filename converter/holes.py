"""Space of a file that is given back to the file system."""

from __future__ import annotations

import errno
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
