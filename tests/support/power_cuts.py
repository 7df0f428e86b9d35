"""What a disk may hold after a power cut: changes are recorded while they happen, then replayed in part."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import random
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from durability import Watch


@dataclasses.dataclass(frozen=True)
class Op:
    """One recorded change. `syncs` makes earlier changes of `inode` durable; the others change `inode`.

    `entries`: names set in (or, with None, taken out of) the folder `inode`; all of them, or none, are on disk.
    `data`: bytes at an offset; None: the file gets `offset` bytes long.
    """

    inode: int
    syncs: bool = False
    entries: tuple[tuple[str, int | None], ...] = ()
    offset: int = 0
    data: bytes | None = None

    @property
    def is_data(self) -> bool:
        return not self.syncs and not self.entries


class Recorder(Watch):
    """Writes down every change below a folder, and builds what a disk may hold after a power cut.

    The rules are POSIX's, stricter than any one file system's: of what was not fsynced, any part may be on disk, in any
    order, but a rename in a folder is on disk as a whole or not at all.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.ops: list[Op] = []
        self.folders: dict[int, dict[str, int]] = {}
        self.contents: dict[int, bytes] = {}
        self._inodes: dict[str, int] = {}
        self.numbers: dict[int, int] = {}
        for path in (folder, *sorted(folder.rglob("*"))):
            inode = self._new(str(path))
            if path.is_dir():
                self.folders[inode] = {}
            else:
                self.contents[inode] = path.read_bytes()
            if path != folder:
                self.folders[self._inodes[str(path.parent)]][path.name] = inode
        self.first = dict(self.contents)

    def _new(self, path: str) -> int:
        inode = len(self.numbers)
        self.numbers[inode] = os.lstat(path).st_ino
        self._inodes[path] = inode
        return inode

    def call(self, name: str, path: str, real: Callable[..., Any], args: tuple[Any, ...], more: dict[str, Any]) -> Any:
        with self._lock:
            existed = os.path.lexists(path)
            size = os.fstat(args[0]).st_size if name == "posix_fallocate" else 0
            result = real(*args, **more)
            self._note(name, path, args, result, existed=existed, size=size)
            return result

    def _note(self, name: str, path: str, args: tuple[Any, ...], result: Any, *, existed: bool, size: int) -> None:
        parent = self._inodes.get(os.path.dirname(path), -1)
        leaf = os.path.basename(path)
        if name == "open" and args[1] & os.O_CREAT and not existed:
            self.ops.append(Op(parent, entries=((leaf, self._new(path)),)))
        elif name == "open" and args[1] & os.O_TRUNC:
            self.ops.append(Op(self._inodes[path], offset=0))
        elif name == "mkdir":
            inode = self._new(path)
            self.folders[inode] = {}
            self.ops.append(Op(parent, entries=((leaf, inode),)))
        elif name == "rename":
            self._note_rename(path, os.fspath(args[1]))
        elif name in ("unlink", "rmdir"):
            self.ops.append(Op(parent, entries=((leaf, None),)))
            del self._inodes[path]
        elif name in ("fsync", "fdatasync"):
            self.ops.append(Op(self._inodes[path], syncs=True))
        elif name == "posix_fallocate":
            self.ops.append(Op(self._inodes[path], offset=max(size, args[1] + args[2])))
        elif name == "ftruncate":
            self.ops.append(Op(self._inodes[path], offset=args[1]))
        elif name in ("write", "pwrite"):
            at = args[2] if name == "pwrite" else os.fstat(args[0]).st_size - result
            self.ops.append(Op(self._inodes[path], offset=at, data=bytes(args[1][:result])))
        elif name == "copy_file_range":
            source, _, _, source_at, at = args
            self.ops.append(Op(self._inodes[path], offset=at, data=self._real["pread"](source, result, source_at)))

    def _note_rename(self, old: str, new: str) -> None:
        assert os.path.dirname(old) == os.path.dirname(new)
        inode = self._inodes.pop(old)
        moved = {p: i for p, i in self._inodes.items() if p.startswith(old + "/")}
        for path in moved:
            del self._inodes[path]
        self._inodes |= {new + p.removeprefix(old): i for p, i in moved.items()}
        self._inodes[new] = inode
        for fd, path in self.paths.items():
            if path == old or path.startswith(old + "/"):
                self.paths[fd] = new + path.removeprefix(old)
        parent = self._inodes[os.path.dirname(old)]
        self.ops.append(Op(parent, entries=((os.path.basename(old), None), (os.path.basename(new), inode))))

    def states(self, seed: int = 0) -> Iterator[State]:
        """Every distinct disk that a power cut may leave: at each point nothing, all, one, all but one, or some of what
        was not made durable."""
        rng = random.Random(seed)
        seen: set[tuple[tuple[str, Any], ...]] = set()
        for stop in range(len(self.ops) + 1):
            loose = self._not_durable(stop)
            firm = set(range(stop)) - set(loose)
            kept: list[Collection[int]] = [loose, (), *((n,) for n in loose), *(set(loose) - {n} for n in loose)]
            kept += [loose[:n] for n in range(len(loose))]
            kept += [{n for n in loose if rng.random() < 0.5} for _ in range(4 if len(loose) > 2 else 0)]
            for some in kept:
                state = State(self, frozenset(firm | set(some)))
                key = tuple(sorted(state.keys.items()))
                if key not in seen:
                    seen.add(key)
                    yield state

    def least(self) -> State:
        """The disk that a power cut leaves now if nothing is on it that was not made durable."""
        stop = len(self.ops)
        return State(self, frozenset(set(range(stop)) - set(self._not_durable(stop))))

    def _not_durable(self, stop: int) -> list[int]:
        return [
            n
            for n, op in enumerate(self.ops[:stop])
            if not op.syncs and not any(o.syncs and o.inode == op.inode for o in self.ops[n + 1 : stop])
        ]


class State:
    """One disk: the recorded changes that are on it."""

    def __init__(self, recorder: Recorder, applied: frozenset[int]) -> None:
        self._recorder = recorder
        self._folders = {i: dict(entries) for i, entries in recorder.folders.items()}
        self._data: dict[int, tuple[int, ...]] = {}
        for n in sorted(applied):
            op = recorder.ops[n]
            for name, inode in op.entries:
                if inode is None:
                    self._folders[op.inode].pop(name, None)
                else:
                    self._folders[op.inode][name] = inode
            if op.is_data:
                self._data[op.inode] = (*self._data.get(op.inode, ()), n)
        self.inodes = dict(self._walk(0, ""))
        self.keys = {path: (i, self._data.get(i, ())) for path, i in self.inodes.items()}

    def _walk(self, inode: int, prefix: str) -> Iterator[tuple[str, int]]:
        for name, child in self._folders[inode].items():
            yield prefix + name, child
            if child in self._folders:
                yield from self._walk(child, f"{prefix}{name}/")

    def tree(self, top: str) -> dict[str, str] | None:
        """Like `durability.tree` of `top`; None where it is not there."""
        if top not in self.inodes:
            return None
        found = {p.removeprefix(top + "/"): i for p, i in self.inodes.items() if p.startswith(top + "/")}
        return {
            p: "folder" if i in self._folders else hashlib.sha256(self._content(i)).hexdigest()
            for p, i in sorted(found.items())
        }

    def _content(self, inode: int) -> bytes:
        return _content(self._recorder, inode, self._data.get(inode, ()))

    def lay_out(self, folder: Path) -> None:
        """Put it on the real disk. Inode numbers that a file speaks of become those that the folders have now."""
        folder.mkdir()
        numbers: dict[int, int] = {}
        later: list[tuple[Path, int]] = []
        for path, inode in sorted(self.inodes.items()):
            target = folder / path
            if inode in self._folders:
                target.mkdir()
                numbers[self._recorder.numbers[inode]] = target.stat().st_ino
            else:
                later.append((target, inode))
        for target, inode in later:
            content = self._content(inode)
            if target.name.endswith(".replacing") and content.endswith(b"\n"):
                word, _, number = content.decode().rpartition(" ")
                content = f"{word} {numbers.get(int(number), 1)}\n".encode()
            target.write_bytes(content)


@functools.lru_cache(maxsize=4096)
def _content(recorder: Recorder, inode: int, applied: tuple[int, ...]) -> bytes:
    content = bytearray(recorder.first.get(inode, b""))
    for n in applied:
        op = recorder.ops[n]
        size = op.offset + len(op.data or b"")
        if op.data is None:
            del content[size:]
        content.extend(bytes(max(size - len(content), 0)))
        content[op.offset : size] = op.data or b""
    return bytes(content)
