"""The stage: a folder beside the output in which a run works, its lock, its journal, and the rename that publishes it.

Invariant: OUT is absent or whole. Everything is written to `OUT.partial/`, fsynced, and renamed to OUT in one step.
With `--overwrite` the old output is first moved to `OUT.old`; a marker file `OUT.replacing` says that this is under
way, so that a later run can tell our half-done replacement from a folder that merely has that name.

Sources: PostgreSQL's durable_rename (fsync file, rename, fsync folder; a failed fsync is final),
https://github.com/postgres/postgres/blob/REL_17_0/src/backend/storage/file/fd.c
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from converter.copying import write_all
from converter.errors import Refused, show
from converter.plan import RECEIPT_FILE

JOURNAL = "journal.jsonl"
FILE_MODE = 0o666
"""Permissions of new files, less the user's umask, as `open` gives them."""


def fsync_folder(folder: Path) -> None:
    """Make names in `folder` durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_durably(path: Path, content: bytes) -> None:
    """Write a small file whole: beside, fsync, rename. The caller fsyncs the folder."""
    temporary = path.with_name(path.name + ".tmp")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, FILE_MODE)
    try:
        write_all(fd, content, 0)
        os.fsync(fd)
    finally:
        os.close(fd)
    os.rename(temporary, path)


class Stage:
    """`OUT.partial/`, locked for as long as this object is open."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.folder = out.with_name(out.name + ".partial")
        self.old = out.with_name(out.name + ".old")
        self.marker = out.with_name(out.name + ".replacing")
        self._lock = -1
        self._journal = -1

    def open(self) -> None:
        """Create the folder where it is missing, and lock it.

        Raises:
            Refused: another run holds the lock (`output-busy`), or the folder is not one of ours (`stage-foreign`).
        """
        self.out.parent.mkdir(parents=True, exist_ok=True)
        while True:
            try:
                os.mkdir(self.folder)
                fsync_folder(self.out.parent)
            except FileExistsError:
                if self.folder.is_symlink() or not self.folder.is_dir():
                    raise self._foreign() from None
            try:
                self._lock = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            except FileNotFoundError:
                continue
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                self.close()
                if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    raise Refused(
                        "output-busy", "another run is writing this output", where=show(self.out), next="wait for it to end"
                    ) from error
                raise
            if self._is_current():
                return
            self.close()

    def _is_current(self) -> bool:
        """The locked folder may have been published by its owner between our open and our lock."""
        try:
            named = os.stat(self.folder)
        except FileNotFoundError:
            return False
        locked = os.fstat(self._lock)
        return (named.st_dev, named.st_ino) == (locked.st_dev, locked.st_ino)

    def _foreign(self) -> Refused:
        return Refused(
            "stage-foreign",
            f"{show(self.folder.name)} is in the way and was not made by this tool",
            where=show(self.out.parent),
            next=f"move it away, or choose another output than {show(self.out.name)}",
        )

    def close(self) -> None:
        """Release the lock and the journal; the folder stays as it is."""
        for name in ("_journal", "_lock"):
            fd = getattr(self, name)
            if fd >= 0:
                os.close(fd)
                setattr(self, name, -1)

    def resume(self, summary: Mapping[str, str], *, fresh: bool) -> dict[str, Any]:
        """Journalled shards of an earlier run of the same plan, by file name; otherwise an empty folder and nothing.

        Args:
            summary: the plan's parts, as `Plan.summary`.
            fresh: forget what an earlier run left, whatever its plan.

        Raises:
            Refused: the folder holds another plan's work (`stage-differs`), or is not ours (`stage-foreign`).
        """
        lines = self._read_journal()
        if lines and not fresh:
            self._expect_same_plan(lines[0], summary)
            self._open_journal()
            return {line["shard"]: line for line in lines[1:]}
        if not lines and not self._is_ours():
            raise self._foreign()
        self._empty()
        write_durably(self.folder / JOURNAL, _line({"plan": dict(summary)}))
        fsync_folder(self.folder)
        self._open_journal()
        return {}

    def _is_ours(self) -> bool:
        """Empty, or left by a run that ended between its last file and the rename: then it holds our receipt."""
        names = os.listdir(self.folder)
        return not names or RECEIPT_FILE in names or names == [JOURNAL + ".tmp"]

    def _read_journal(self) -> list[dict[str, Any]]:
        """Whole lines of the journal; a last line that a crash cut is left out."""
        try:
            raw = (self.folder / JOURNAL).read_bytes()
        except FileNotFoundError:
            return []
        lines: list[dict[str, Any]] = []
        for text in raw.split(b"\n")[:-1]:
            try:
                line = json.loads(text)
            except ValueError:
                break
            if not isinstance(line, dict):
                break
            lines.append(line)
        return lines if lines and isinstance(lines[0].get("plan"), dict) else []

    def _expect_same_plan(self, first: Mapping[str, Any], summary: Mapping[str, str]) -> None:
        before = first["plan"]
        for key in [*summary, *before]:
            if before.get(key) != summary.get(key):
                raise Refused(
                    "stage-differs",
                    f"{show(self.folder.name)} holds unfinished work of another plan; the first difference is: {show(key)}",
                    where=show(self.out.parent),
                    expected=show(before.get(key, "nothing")),
                    got=show(summary.get(key, "nothing")),
                    next="repeat the earlier command to finish it, or add --no-resume to begin anew",
                )

    def _open_journal(self) -> None:
        self._journal = os.open(self.folder / JOURNAL, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        self._trim_journal()

    def _trim_journal(self) -> None:
        """Cut a half-written last line, so that the next one begins on a line of its own."""
        raw = (self.folder / JOURNAL).read_bytes()
        whole = raw.rfind(b"\n") + 1
        if whole != len(raw):
            os.ftruncate(self._journal, whole)

    def record(self, line: Mapping[str, Any]) -> None:
        """Append a line to the journal and make it durable."""
        data = memoryview(_line(line))
        while data:
            data = data[os.write(self._journal, data) :]
        os.fsync(self._journal)

    def _empty(self) -> None:
        for name in os.listdir(self.folder):
            path = self.folder / name
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def discard(self) -> None:
        """Remove the folder: nothing of this run remains."""
        self._empty()
        os.rmdir(self.folder)
        self.close()

    def publish(self, *, replace: bool) -> None:
        """Give the folder its final name: the one moment at which the output comes into being."""
        (self.folder / JOURNAL).unlink()
        fsync_folder(self.folder)
        parent = self.out.parent
        if replace and os.path.lexists(self.out):
            write_durably(self.marker, b"")
            fsync_folder(parent)
            os.rename(self.out, self.old)
            fsync_folder(parent)
        os.rename(self.folder, self.out)
        fsync_folder(parent)
        if replace and self.marker.exists():
            self._finish_replacing()
        self.close()

    def recover(self) -> None:
        """Bring a replacement that a crash interrupted to its end: the old output back, or the old one away."""
        if not self.marker.exists():
            return
        if os.path.lexists(self.old):
            if os.path.lexists(self.out):
                self._finish_replacing()
                return
            os.rename(self.old, self.out)
            fsync_folder(self.out.parent)
        self.marker.unlink()
        fsync_folder(self.out.parent)

    def _finish_replacing(self) -> None:
        if os.path.lexists(self.old):
            shutil.rmtree(self.old)
            fsync_folder(self.out.parent)
        self.marker.unlink()
        fsync_folder(self.out.parent)


def _line(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode() + b"\n"
