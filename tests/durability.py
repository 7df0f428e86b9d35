"""What the tests of the writer share: a small merge, faults in operating-system calls, and the states after a power cut.

Nothing here stands in for the file system: calls go through to it, some of them after an error was raised in their
place, or after they were written down. Run as a program, this module runs command lines in forked children (`serve`),
so that a run can be killed at any call without paying for the import of torch each time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

FIXTURES = Path(__file__).resolve().parents[1] / "converter" / "fixtures"

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

    def checking(self) -> None:
        pass


def copy_inputs(folder: Path) -> tuple[Path, Path]:
    """The shipped base and adapter, in `folder`."""
    base, adapter = folder / "base", folder / "adapter"
    shutil.copytree(FIXTURES / "tiny-qwen2-base", base)
    shutil.copytree(FIXTURES / "tiny-reward-adapter", adapter)
    return base, adapter


def merge_plan(base: Path, adapter: Path, **layout: Any) -> Any:
    """The plan of the merge: copied, computed and dropped tensors in two shards, side files from both inputs."""
    from converter.context import Context
    from converter.converters.merge_lora import MergeLora
    from converter.plan import make_plan
    from converter.sources.hf import SOURCE as HF
    from converter.sources.peft import SOURCE as PEFT

    context = Context()
    opened = PEFT.open(adapter, asked="adapter")
    merged = MergeLora(adapters=(opened,))(HF.open(base, asked="base"), context)
    return make_plan(merged, context=context, provenance={"inputs": [base.name, adapter.name]}, **layout)


def tree(folder: Path) -> dict[str, str]:
    """Every path below `folder` with the digest of its content, or `folder`."""
    return {
        str(p.relative_to(folder)): "folder" if p.is_dir() else hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
    }


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


class Fault(Watch):
    """Raises an error in place of the n-th call (from 0) that the error can happen to."""

    def __init__(self, folder: Path, *, at: int, number: int = errno.EIO) -> None:
        super().__init__(folder)
        self.at, self.number = at, number
        self.happened: str | None = None
        self._count = 0

    def call(self, name: str, path: str, real: Callable[..., Any], args: tuple[Any, ...], more: dict[str, Any]) -> Any:
        if self.number != errno.ENOSPC or self._needs_space(name, args):
            with self._lock:
                hit = self._count == self.at
                self._count += 1
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


# The states after a power cut


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


# Command lines in forked children


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a child ended: its exit code, or minus the number of the signal that killed it."""

    code: int
    err: str
    seconds: float
    reached: bool  # the call at which it was to die


class Server:
    """A process that has imported everything and runs each command line in a forked child."""

    def __init__(self) -> None:
        command = [sys.executable, str(Path(__file__)), "serve"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(
        self,
        *arguments: object,
        folder: Path,
        die_at: int | None = None,
        kill: tuple[int, float] | None = None,
        file_size: int | None = None,
    ) -> Ended:
        """`rlhf-convert ARGUMENTS` in `folder`.

        Args:
            die_at: the watched call below `folder` at which the process ends.
            kill: a signal and the seconds after which it is sent.
            file_size: the size in bytes beyond which no file may grow.
        """
        asked = {
            "argv": [str(a) for a in arguments], "folder": str(folder), "die_at": die_at, "kill": kill,
            "file_size": file_size,
        }  # fmt: skip
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        return Ended(**json.loads(self._process.stdout.readline()))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.communicate()


def serve() -> None:
    """Answers one JSON line with another until its input ends."""
    import torch

    from converter.cli import main

    torch.set_num_threads(1)  # no thread of torch's may be there when a child is made
    with fast_folder() as folder:
        # Once here, so that all is imported that a child needs.
        base, adapter = copy_inputs(folder)
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            assert main(["merge-lora", str(adapter), str(folder / "out"), "--base", str(base)]) == 0
    for line in sys.stdin:
        print(json.dumps(_fork(main, **json.loads(line))), flush=True)


def _fork(
    main: Callable[[list[str]], int],
    argv: list[str],
    folder: str,
    die_at: int | None,
    kill: tuple[int, float] | None,
    file_size: int | None,
) -> dict[str, Any]:
    log = Path(folder).parent / f"{Path(folder).name}.stderr"
    log.touch()
    begun = time.monotonic()
    child = os.fork()
    if child == 0:
        code = 70
        try:
            _redirect(log)
            os.chdir(folder)
            if file_size is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
            with Death(Path(folder), at=-1 if die_at is None else die_at):
                code = main(argv)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    if kill is not None:
        time.sleep(kill[1])
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, kill[0])
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    err = log.read_text()
    log.unlink()
    return {"code": status, "err": err, "seconds": time.monotonic() - begun, "reached": status == 9}


def _redirect(log: Path) -> None:
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(fd, 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    # Fresh objects: what the parent had not flushed is not ours to say.
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115


if __name__ == "__main__" and sys.argv[1:] == ["serve"]:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    serve()
