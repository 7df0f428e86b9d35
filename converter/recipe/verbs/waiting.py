"""Waiting until something may have changed below a folder: told by the kernel where it can tell, else by time alone.

A file system that other machines write to tells nobody here what they do: there, and without the package `watchfiles`,
looks are taken at intervals.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, Protocol

from converter.errors import UsageError
from converter.text import show

Notify = Literal["auto", "inotify", "poll"]

IDLE = 60.0
"""Seconds after which there is a look though the kernel told of nothing: it drops what comes too fast."""

_SHARED = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "smbfs", "lustre", "gpfs", "ceph", "9p", "afs", "beegfs", "wekafs", "glusterfs",
     "ocfs2", "gfs2", "panfs", "pvfs2", "virtiofs", "vboxsf"}
)  # fmt: skip
"""File systems that other machines may write to; every one in user space (`fuse.*`) is taken for one too."""


class Waiter(Protocol):
    """Waits for changes below a folder."""

    is_told: bool

    def wait(self, seconds: float) -> None:
        """Return after so many seconds, or earlier, where something has changed."""


class Polling:
    """Time passes."""

    is_told = False

    def wait(self, seconds: float) -> None:
        """Sleep."""
        time.sleep(seconds)


class Notified:
    """The kernel tells, through `watchfiles`; it is heard in a thread, so that signals reach the main one."""

    is_told = True

    def __init__(self, root: Path) -> None:
        from watchfiles import _rust_notify

        self._changed, self._stop = threading.Event(), threading.Event()
        self._told = _rust_notify.RustNotify([str(root)], False, False, 300, True, True)
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        while not self._stop.is_set():
            heard = self._told.watch(100, 50, 500, self._stop)
            if isinstance(heard, set):
                self._changed.set()

    def wait(self, seconds: float) -> None:
        """Wait for a change; what changed since the last wait counts."""
        self._changed.wait(seconds)
        self._changed.clear()

    def close(self) -> None:
        """Hear no more."""
        self._stop.set()
        self._thread.join(2.0)
        self._told.close()


@contextmanager
def waiting(root: Path, notify: Notify) -> Iterator[Waiter]:
    """What waits for changes below a folder.

    Args:
        notify: `auto` asks the kernel where that is of use.

    Raises:
        UsageError: the kernel was asked for, and can't tell (`watch-notify`).
    """
    if notify == "poll" or (notify == "auto" and (find_spec("watchfiles") is None or is_shared(root))):
        yield Polling()
        return
    try:
        told = Notified(root)
    except (ImportError, OSError) as error:
        if notify == "auto":
            yield Polling()
            return
        what = f"the system does not tell of changes below {show(root)}: {show(error)}"
        next_step = "pip install 'rlhf-convert[watch]', or leave --notify inotify out"
        raise UsageError("watch-notify", what, next=next_step) from None
    try:
        yield told
    finally:
        told.close()


def is_shared(folder: Path) -> bool:
    """True where other machines may write to a folder, by the type of its file system, or where that is unknown."""
    kind = file_system_of(os.path.realpath(folder))
    return kind is None or kind in _SHARED or kind.startswith("fuse")


def file_system_of(path: str, mounts: str | None = None) -> str | None:
    """The type of the file system that a path is on, by the longest mount point above it.

    Args:
        mounts: lines as those of /proc/self/mounts; None: those.
    """
    if mounts is None:
        try:
            mounts = Path("/proc/self/mounts").read_text("utf-8", "surrogateescape")
        except OSError:
            return None
    best, kind = -1, None
    for line in mounts.splitlines():
        words = line.split(" ")
        point = words[1].encode("utf-8", "surrogateescape").decode("unicode_escape") if len(words) > 2 else ""
        is_above = path == point or path.startswith(point.rstrip("/") + "/")
        if point and is_above and len(point) >= best:
            best, kind = len(point), words[2]
    return kind
