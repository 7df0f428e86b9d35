"""What the tests of the writer share: a small merge, and operating-system calls that are watched or fail.

Nothing here stands in for the file system: calls go through to it, some of them after an error was raised in their
place.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import hashlib
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from converter.shipped import shipped

FIXTURES = shipped("fixtures")

WATCHED = (
    "open", "mkdir", "rename", "unlink", "rmdir", "listdir", "fsync", "fdatasync", "posix_fallocate", "ftruncate",
    "write", "pwrite", "pread", "preadv", "copy_file_range",
)  # fmt: skip
"""Calls of `os` through which the writer touches the disk."""

TAKES_SPACE = frozenset({"open", "mkdir", "rename", "posix_fallocate", "write", "pwrite", "copy_file_range", "fsync"})
"""Those that a full disk can fail; `fsync` where the file system allocates late."""


# A small merge


@contextlib.contextmanager
def fast_folder() -> Iterator[Path]:
    """A folder in memory where there is one: an fsync that costs nothing makes hundreds of runs affordable."""
    memory = Path("/dev/shm")
    roomy = memory.is_dir() and os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 256_000_000
    with tempfile.TemporaryDirectory(dir=memory if roomy else None) as folder:
        yield Path(folder).resolve()


class Quiet:
    """A reporter that remembers what it was told."""

    def __init__(self) -> None:
        self.resumed: list[str] = []
        self.written: list[str] = []
        self.bytes = 0
        self._lock = threading.Lock()

    def start(self, total_bytes: int, shards: int) -> None:
        self.total = total_bytes

    def advance(self, count: int, tensor: str) -> None:
        with self._lock:
            self.bytes += count

    def shard_done(self, file: str, size: int, resumed: bool) -> None:
        (self.resumed if resumed else self.written).append(file)

    def checking(self, what: str) -> None:
        pass


def copy_inputs(folder: Path) -> tuple[Path, Path]:
    """The shipped base and adapter, in `folder`."""
    base, adapter = folder / "base", folder / "adapter"
    shutil.copytree(FIXTURES / "tiny-qwen2-base", base)
    shutil.copytree(FIXTURES / "tiny-reward-adapter", adapter)
    return base, adapter


def merge_plan(
    base: Path, adapter: Path, *, change: Callable[[Any], Any] = lambda merged: merged, **layout: Any
) -> Any:
    """The plan of the merge: copied, computed and dropped tensors in two shards, side files from both inputs.

    `change` is applied to the merged checkpoint.
    """
    from converter.converters.merge.merge_lora import MergeLora
    from converter.core.context import Context
    from converter.core.writer.plan import make_plan
    from converter.sources.hf.peft import SOURCE as PEFT
    from converter.sources.hf.source import SOURCE as HF

    context = Context()
    opened = PEFT.open(adapter, asked="adapter")
    merged = MergeLora(adapters=(opened,))(HF.open(base, asked="base"), context)
    return make_plan(change(merged), context=context, provenance={"inputs": [base.name, adapter.name]}, **layout)


def tree(folder: Path) -> dict[str, str]:
    """Every path below `folder` with the digest of its content, or `folder`, or where it links to."""
    return {str(p.relative_to(folder)): _content(p) for p in sorted(folder.rglob("*"))}


def _content(path: Path) -> str:
    if path.is_symlink():
        return f"link to {os.readlink(path)}"
    return "folder" if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest()


# Operating-system calls, watched


class Watch:
    """While it is entered, every watched call on a path below `folder` goes through `call`."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)
        self.paths: dict[int, str] = {}
        self._real: dict[str, Callable[..., Any]] = {}
        self._lock = threading.RLock()

    def __enter__(self) -> Self:
        for name in (*WATCHED, "close"):
            real = getattr(os, name)
            self._real[name] = real
            setattr(os, name, functools.partial(self._close if name == "close" else self._pass, name, real))
        return self

    def __exit__(self, *exc: object) -> None:
        for name, real in self._real.items():
            setattr(os, name, real)

    def call(self, name: str, path: str, real: Callable[..., Any], args: tuple[Any, ...], more: dict[str, Any]) -> Any:
        """Do it; subclasses fail it, or write it down."""
        return real(*args, **more)

    def _close(self, name: str, real: Callable[..., Any], fd: int) -> None:
        # Forgotten first: another thread may be given the number as soon as it is free.
        self.paths.pop(fd, None)
        real(fd)

    def _pass(self, name: str, real: Callable[..., Any], *args: Any, **more: Any) -> Any:
        path = self._path(name, args, more)
        if path is None:
            return real(*args, **more)
        result = self.call(name, path, real, args, more)
        if name == "open":
            self.paths[result] = path
        return result

    def _path(self, name: str, args: tuple[Any, ...], more: Mapping[str, Any]) -> str | None:
        if isinstance(args[0], int):
            # A copy is a matter of the file that is written.
            return self.paths.get(args[1] if name == "copy_file_range" else args[0])
        path = os.path.join(os.getcwd(), self.paths.get(more.get("dir_fd", -1), ""), os.fspath(args[0]))
        return path if path == self.folder or path.startswith(self.folder + "/") else None


@dataclasses.dataclass(frozen=True)
class Call:
    """A watched call: its name, its path below the watched folder, and which one of these it is in a run, from 0."""

    name: str
    path: str
    nth: int = 0

    @property
    def kind(self) -> tuple[str, str]:
        """The same of calls that differ in a shard's number, or in which of an input's side files they touch."""
        return self.name, _SIDE_FILE.sub("side-file", _DIGITS.sub("N", self.path))


_DIGITS = re.compile(r"\d+")
_SIDE_FILE = re.compile(r"(?:tokenizer|tokenizer_config|generation_config|chat_template)\.[a-z]+")


def telling(calls: Sequence[Call]) -> list[Call]:
    """The first and the last of each kind, in their order."""
    ends = {call.kind: call for call in reversed(calls)}, {call.kind: call for call in calls}
    wanted = {call for each in ends for call in each.values()}
    return [call for call in calls if call in wanted]


class Fault(Watch):
    """Raises an error in place of one call: the n-th (from 0) that the error can happen to, or one that is named."""

    def __init__(self, folder: Path, *, at: int | Call, number: int = errno.EIO) -> None:
        super().__init__(folder)
        self.at, self.number = at, number
        self.happened: str | None = None
        self.calls: list[Call] = []
        self._seen: dict[tuple[str, str], int] = {}

    def call(self, name: str, path: str, real: Callable[..., Any], args: tuple[Any, ...], more: dict[str, Any]) -> Any:
        if self.number != errno.ENOSPC or self._needs_space(name, args):
            with self._lock:
                below = path.removeprefix(self.folder)
                nth = self._seen.get((name, below), 0)
                self._seen[name, below] = nth + 1
                now = Call(name, below, nth)
                hit = self.at in (len(self.calls), now)
                self.calls.append(now)
            if hit:
                self.happened = f"{name} {path}"
                self.strike()
        return real(*args, **more)

    def strike(self) -> None:
        raise OSError(self.number, os.strerror(self.number))

    @staticmethod
    def _needs_space(name: str, args: tuple[Any, ...]) -> bool:
        return name in TAKES_SPACE and (name != "open" or bool(args[1] & os.O_CREAT))


class Death(Fault):
    """Ends the process in place of the n-th call, as kill -9 would."""

    def strike(self) -> None:
        os._exit(9)
