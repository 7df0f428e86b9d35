"""The stage: a folder beside the output in which a run works, its lock, its journal, and the rename that publishes it.

Invariant: OUT is absent or whole. Everything is written to `OUT.partial/`, fsynced, and renamed to OUT in one step.
With `--overwrite` the old output is first moved to `OUT.old`; a marker file `OUT.replacing`, durable before the move,
holds that folder's inode number, so that a later run can tell our half-done replacement from a stranger's folder.

Sources: PostgreSQL's durable_rename (fsync file, rename, fsync folder; a failed fsync is final),
https://github.com/postgres/postgres/blob/REL_17_0/src/backend/storage/file/fd.c
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from converter.core.files.names import RECEIPT
from converter.core.writer.copying import write_all
from converter.errors import Refused
from converter.text import show

JOURNAL = "journal.jsonl"
FILE_MODE = 0o666
"""Permissions of new files, less the user's umask, as `open` gives them."""

_MARK = b"replaces inode "
_MARKED = re.compile(rb"replaces inode (\d+)\n")


def fsync_folder(folder: Path) -> None:
    """Make names in `folder` durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_folders(folder: Path) -> list[Path]:
    """Make a folder and its missing parents, durably; the ones that were made, outermost first."""
    missing = []
    while not os.path.lexists(folder):
        missing.append(folder)
        folder = folder.parent
    missing.reverse()
    for each in missing:
        each.mkdir(exist_ok=True)
        fsync_folder(each.parent)
    return missing


def write_durably(path: Path, content: bytes) -> None:
    """Write a small file whole: beside, fsync, rename. The caller fsyncs the folder."""
    temporary = path.with_name(path.name + ".tmp")
    _write_synced(temporary, content)
    os.rename(temporary, path)


def _write_synced(path: Path, content: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, FILE_MODE)
    try:
        write_all(fd, content, 0)
        os.fsync(fd)
    finally:
        os.close(fd)


class Stage:
    """`OUT.partial/`, locked for as long as this object is open.

    Attributes:
        is_ours: the folder holds this run's journal, and nothing else but what the journal lists.
        has_work: a later run of the same plan could go on from what the journal lists.
        is_published: the folder has the output's name.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.folder = out.parent / (out.name + ".partial")
        self.old = out.parent / (out.name + ".old")
        self.marker = out.parent / (out.name + ".replacing")
        self.is_ours = False
        self.has_work = False
        self.is_published = False
        self._made: list[Path] = []
        self._lock = -1
        self._journal = -1

    # Lock

    def open(self) -> None:
        """Create the folder where it is missing, and lock it.

        Raises:
            Refused: another run holds the lock (`output-busy`), or the folder is not one of ours (`stage-foreign`).
        """
        self._made = make_folders(self.out.parent)
        while True:
            made = self._make()
            try:
                self._lock = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            except FileNotFoundError:
                continue
            try:
                self._flock(self._lock)
            except BaseException:
                self.close()
                raise
            if self._is_current():
                self._made += [self.folder] if made else []
                return
            self.close()

    def _make(self) -> bool:
        try:
            os.mkdir(self.folder)
        except FileExistsError:
            if self.folder.is_symlink() or not self.folder.is_dir():
                raise self._foreign(self.folder) from None
            return False
        fsync_folder(self.out.parent)
        return True

    def _flock(self, fd: int) -> None:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            raise Refused(
                "output-busy", "another run is writing this output", where=show(self.out), next="wait for it to end"
            ) from error

    def _is_current(self) -> bool:
        """False where the locked folder was published or removed by its owner between our open and our lock."""
        try:
            named = os.stat(self.folder, follow_symlinks=False)
        except FileNotFoundError:
            return False
        locked = os.fstat(self._lock)
        return (named.st_dev, named.st_ino) == (locked.st_dev, locked.st_ino)

    def close(self) -> None:
        """Release the lock and the journal; the folder stays as it is."""
        for name in ("_journal", "_lock"):
            fd = getattr(self, name)
            if fd >= 0:
                setattr(self, name, -1)
                os.close(fd)

    def _foreign(self, path: Path) -> Refused:
        return Refused(
            "stage-foreign",
            f"{show(path.name)} is in the way and was not made by this tool",
            where=show(self.out.parent),
            next=f"move it away, or choose another output than {show(self.out.name)}",
        )

    # Journal

    def resume(self, summary: Mapping[str, str], origin: Mapping[str, Any], *, fresh: bool) -> dict[str, Any]:
        """Make the folder ours; journalled shards of an earlier run of the same plan, by file name.

        Args:
            summary: the plan's parts, as `Plan.summary`.
            origin: what the receipt of this plan will say of its making, as `Plan.provenance`.
            fresh: forget what an earlier run left, whatever its plan.

        Raises:
            Refused: the folder holds another plan's work (`stage-differs`), or is not ours (`stage-foreign`).
        """
        lines = self._read_journal()
        if lines and not fresh:
            self._expect_same_plan(lines[0]["plan"], summary)
        elif not lines and not self._is_empty() and not self._holds_our_receipt(None if fresh else origin):
            raise self._foreign(self.folder)
        kept = {} if fresh else {line["shard"]: line for line in lines[1:]}
        self.is_ours, self.has_work = True, bool(kept)
        # The new journal first: from here on a crash leaves a folder that a later run knows as ours.
        text = b"".join(map(_line, ({"plan": dict(summary)}, *kept.values())))
        write_durably(self.folder / JOURNAL, text)
        fsync_folder(self.folder)
        self._empty(keep={JOURNAL, *kept})
        self._journal = os.open(self.folder / JOURNAL, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        return kept

    def lines_of(self, summary: Mapping[str, str]) -> dict[str, Any] | None:
        """Journal lines by file; None where there is no journal of this plan. Its owner may be writing it."""
        lines = self._read_journal()
        if not lines or lines[0]["plan"] != dict(summary):
            return None
        return {line["shard"]: line for line in lines[1:]}

    def expect_plan(self, summary: Mapping[str, str]) -> None:
        """Refuse a journal of another plan (`stage-differs`); one that is not there is not."""
        if lines := self._read_journal():
            self._expect_same_plan(lines[0]["plan"], summary)

    def _is_empty(self) -> bool:
        return set(os.listdir(self.folder)) <= {JOURNAL + ".tmp"}

    def _holds_our_receipt(self, origin: Mapping[str, Any] | None) -> bool:
        """Left by a run of the same origin (None: of any) that ended between its last file and the rename.

        A finished model of another origin, which its owner may have moved here, must not be taken for that.
        """
        try:
            receipt = json.loads((self.folder / RECEIPT).read_bytes())
        except (OSError, ValueError, RecursionError):
            return False
        expected = {} if origin is None else json.loads(json.dumps(dict(origin)))
        return isinstance(receipt, dict) and all(receipt.get(key) == value for key, value in expected.items())

    def _read_journal(self) -> list[dict[str, Any]]:
        """The journal's whole lines: the plan, then shards; what a crash cut is left out."""
        try:
            raw = (self.folder / JOURNAL).read_bytes()
        except FileNotFoundError:
            return []
        lines: list[dict[str, Any]] = []
        for text in raw.split(b"\n")[:-1]:
            try:
                line = json.loads(text)
            except (ValueError, RecursionError):
                break
            wanted = {"shard": str, "size": int, "crc": dict, "measures": dict} if lines else {"plan": dict}
            if not isinstance(line, dict) or not all(isinstance(line.get(k), t) for k, t in wanted.items()):
                break
            lines.append(line)
        return lines

    def _expect_same_plan(self, before: Mapping[str, Any], summary: Mapping[str, str]) -> None:
        for key in [*summary, *before]:
            if before.get(key) != summary.get(key):
                raise Refused(
                    "stage-differs",
                    f"{show(self.folder.name)} holds unfinished work of another plan, which differs in: {show(key)}",
                    where=show(self.out.parent),
                    expected=show(before.get(key, "nothing")),
                    got=show(summary.get(key, "nothing")),
                    next="repeat the earlier command to finish it, or add --no-resume to begin anew",
                )

    def record(self, line: Mapping[str, Any]) -> None:
        """Append a line to the journal and make it durable."""
        data = memoryview(_line(line))
        while data:
            data = data[os.write(self._journal, data) :]
        os.fsync(self._journal)
        self.has_work = True

    # Content

    def files(self) -> set[str]:
        """Names of all files in the folder, but for the journal."""
        found = {str(Path(root, name).relative_to(self.folder)) for root, _, ns in os.walk(self.folder) for name in ns}
        return found - {JOURNAL}

    def allocated(self) -> int:
        """Bytes of disk that an earlier run's files hold; they are used again or given back."""
        paths = (Path(root, name) for root, _, names in os.walk(self.folder) for name in names)
        return sum(p.lstat().st_blocks for p in paths) * 512

    def link(self, name: str, source: str) -> None:
        """Make a symbolic link to a file, relative, so that folders which are moved together stay together."""
        path = self.folder / name
        make_folders(path.parent)
        os.symlink(os.path.relpath(os.path.realpath(source), os.path.realpath(path.parent)), path)
        fsync_folder(path.parent)

    def _empty(self, *, keep: Collection[str]) -> None:
        """Remove all but the files in `keep`, which are named from this folder."""
        _remove_others(self.folder, keep)

    def discard(self) -> None:
        """Remove what this run made, and what it took over. The journal goes last: it is the mark that all is ours."""
        try:
            if self._lock >= 0 and self._is_current():
                if self.is_ours:
                    marks = {JOURNAL, RECEIPT}
                    self._empty(keep=marks)
                    fsync_folder(self.folder)
                    self._empty(keep=())
                if self.is_ours and self.folder not in self._made:
                    self._made.append(self.folder)
            for folder in reversed(self._made):
                with contextlib.suppress(OSError):
                    os.rmdir(folder)
        finally:
            self.close()

    # Publication

    def publish(self, *, replace: bool) -> None:
        """Give the folder its final name: the one moment at which the output comes into being."""
        (self.folder / JOURNAL).unlink()
        fsync_folder(self.folder)
        if replace and os.path.lexists(self.out):
            self._replace()
        else:
            self._rename()
        self.close()

    def _rename(self) -> None:
        os.rename(self.folder, self.out)
        self.is_published = True
        fsync_folder(self.out.parent)

    def _replace(self) -> None:
        replaced = os.lstat(self.out).st_ino
        _write_synced(self.marker, b"%s%d\n" % (_MARK, replaced))
        fsync_folder(self.out.parent)
        try:
            os.rename(self.out, self.old)
            fsync_folder(self.out.parent)
            self._rename()
        except BaseException:
            if not self.is_published:
                with contextlib.suppress(OSError, Refused):
                    self._recover(replaced)
            raise
        self._end_replacement()

    def recover(self, *, replace: bool) -> None:
        """Bring a replacement that a crash interrupted to its end: the old output back, or the old one away.

        Raises:
            Refused: its run still goes on (`output-busy`); a stranger's file or folder has one of the names that
                a replacement needs (`stage-foreign`).
        """
        if os.path.lexists(self.marker):
            self._recover(self._read_marker())
        if replace and os.path.lexists(self.old):
            raise self._foreign(self.old)

    def _recover(self, replaced: int | None) -> None:
        if replaced is None or not os.path.lexists(self.old) or os.lstat(self.old).st_ino != replaced:
            self._unmark()
        elif not os.path.lexists(self.out):
            os.rename(self.old, self.out)
            fsync_folder(self.out.parent)
            self._unmark()
        elif not (self.out / RECEIPT).is_file():
            raise self._foreign(self.out)
        else:
            # A folder takes its lock along when it is renamed: the run that published it may still be clearing up.
            fd = os.open(self.out, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                self._flock(fd)
                self._end_replacement()
            finally:
                os.close(fd)

    def _read_marker(self) -> int | None:
        """The inode number of the folder being replaced; None where the marker was torn, thus nothing was moved yet."""
        content = self.marker.read_bytes() if self.marker.is_file() else b"?"
        if found := _MARKED.fullmatch(content):
            return int(found[1])
        begun = content.removeprefix(_MARK)
        if _MARK.startswith(content) or begun.isdigit() or not content.strip(b"\0"):
            return None
        raise self._foreign(self.marker)

    def _end_replacement(self) -> None:
        if os.path.lexists(self.old):
            shutil.rmtree(self.old)
            fsync_folder(self.out.parent)
        self._unmark()

    def _unmark(self) -> None:
        self.marker.unlink(missing_ok=True)
        fsync_folder(self.out.parent)


def _remove_others(folder: Path, keep: Collection[str]) -> None:
    for name in os.listdir(folder):
        path = folder / name
        below = [k.removeprefix(name + "/") for k in keep if k.startswith(name + "/")]
        if path.is_dir() and not path.is_symlink():
            _remove_others(path, below) if below else shutil.rmtree(path)
        elif name not in keep:
            path.unlink()


def _line(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode() + b"\n"
