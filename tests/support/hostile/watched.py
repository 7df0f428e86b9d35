"""Runs command lines in children that are watched: nothing may run, be read or be written that is not theirs.

A child has a gigabyte of address space over what it was born with, and twenty seconds a command. An audit hook notes
every attempt to start a program, to use the network, to unpickle, to import or execute something of the input, to open
what must stay closed, and to write anywhere but to the output; the attempt fails.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from converter.families import expected_child
from converter.shipped import shipped
from places import SUPPORT

SPACE = 1_000_000_000
"""Bytes of address space that a child may take."""

HANG = 20
"""Seconds for one command."""

FIXTURES = shipped("fixtures")

FORBIDDEN = frozenset(
    {
        "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "os.startfile", "pty.spawn",
        "subprocess.Popen", "socket.connect", "socket.bind", "socket.getaddrinfo", "socket.gethostbyname",
        "socket.sendto", "urllib.Request", "pickle.find_class", "webbrowser.open", "os.kill", "os.chmod", "os.chown",
    }
)  # fmt: skip
"""Audit events that no command has a reason for. Source: https://docs.python.org/3/library/audit_events.html"""

WRITES = frozenset({"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.symlink", "os.link", "os.truncate"})
PLANTED = "planted_"
"""Modules of the inputs are named so; importing one is an attack that worked."""

CLOSED = ("secret", "/etc/passwd", "/etc/shadow", "/dev/zero", "/dev/urandom", "/dev/full", "/dev/mem", "/proc/self/")
"""Parts of paths that must not be opened: what links and traversals of the inputs lead to."""


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
        code: its exit code, or minus the signal that killed it (14: it hung).
        text: all that it printed.
        attempts: what it tried and must not.
    """

    line: str
    code: int
    text: str
    attempts: tuple[str, ...]
    seconds: float


class Watcher:
    """A process that has imported everything and runs the commands of a case in one child."""

    def __init__(self) -> None:
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "RLHF_"))}
        self._cache = tempfile.mkdtemp(prefix="watched-cache-")
        environment["XDG_CACHE_HOME"] = self._cache
        self._process = subprocess.Popen(
            [sys.executable, "-m", "hostile.watched"],
            cwd=SUPPORT,
            env=environment | {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_TOKEN": "hf_canary_of_a_token"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, lines: Sequence[str], *, folder: Path, closed: Sequence[str] = ()) -> list[Ended]:
        """Each of the lines as `rlhf-convert LINE` in `folder`, until one is killed.

        Args:
            closed: names of files that must not be opened.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        asked = {"lines": list(lines), "folder": str(folder), "closed": list(closed)}
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        return [Ended(**{**each, "attempts": tuple(each["attempts"])}) for each in self._answer()]

    def _answer(self) -> list[dict[str, Any]]:
        assert self._process.stdout is not None
        found: list[dict[str, Any]] = json.loads(self._process.stdout.readline())
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.communicate()
        shutil.rmtree(self._cache, ignore_errors=True)


def note_attempts(folder: Path, closed: Sequence[str], attempts: list[str]) -> None:
    """Watch this process from here on; a hook can't be taken off again."""
    inside = f"{os.path.realpath(folder)}{os.sep}"
    cache = f"{os.path.realpath(os.environ.get('XDG_CACHE_HOME', '/no-cache'))}{os.sep}"

    def is_inside(path: Any) -> bool:
        return os.path.realpath(os.fsdecode(path)).startswith((inside, cache))

    def wrong(event: str, args: tuple[Any, ...]) -> bool:
        match event:
            case "subprocess.Popen":
                return list(args[1]) != [sys.executable, "-I", str(expected_child.PROGRAM)]
            case _ if event in FORBIDDEN:
                return True
            case "import":
                return str(args[0]).startswith(PLANTED)
            case "exec":
                return str(getattr(args[0], "co_filename", "")).startswith(inside)
            case "ctypes.dlopen":
                return args[0] is not None and is_inside(args[0])
            case "open" if isinstance(args[0], str | bytes):
                path = os.path.realpath(os.fsdecode(args[0]))
                if any(part in path.removeprefix(inside) for part in CLOSED) or os.path.basename(path) in closed:
                    return True
                flags = args[2] if isinstance(args[2], int) else 0
                return bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)) and not (
                    path.startswith((f"{inside}out", "/dev/null", cache))
                )
            case _ if event in WRITES:
                return not all(is_inside(a) for a in args if isinstance(a, str | bytes))
        return False

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if wrong(event, args):
            attempts.append(f"{event} {args!r}"[:300])
            raise RuntimeError(f"an attempt that is watched for: {event}")

    sys.addaudithook(hook)


def _serve() -> None:
    """Answers one JSON line with another until its input ends."""
    import huggingface_hub.constants as hub
    import torch

    from converter.cli import main

    torch.set_num_threads(1)  # no thread of torch's may be there when a child is made
    _warm_up(main)
    gc.freeze()  # what children need not copy, since no collection touches it
    for line in sys.stdin:
        asked = json.loads(line)
        hub.HF_HUB_CACHE = str(Path(asked["folder"]) / "hub")
        print(json.dumps(_in_child(main, **asked)), flush=True)


def _warm_up(main: Callable[[list[str]], int]) -> None:
    """Import what commands import, once."""
    base, adapter, run = (str(FIXTURES / n) for n in ("tiny-qwen2-base", "tiny-reward-adapter", "tiny-reward-run"))
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        for each in (
            ["inspect", base], ["doctor", adapter, "--base", base],
            ["merge-lora", adapter, "out", "--base", base, "--dry-run"],
            ["push", base, "a/b", "--dry-run"], ["explain", "no such text"], ["diff", base, base], ["inspect", run],
            ["verify", base, "--for", "openrlhf"], ["repair", adapter, "out", "--dry-run", "--base", base],
        ):  # fmt: skip
            main(each)


def _in_child(
    main: Callable[[list[str]], int], lines: Sequence[str], folder: str, closed: Sequence[str]
) -> list[dict[str, Any]]:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reader)
            os.chdir(folder)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            with open(writer, "w", encoding="utf-8") as pipe:
                _run_all(main, lines, Path(folder), closed, pipe)
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, encoding="utf-8") as pipe:
        ended = [json.loads(line) for line in pipe if line.endswith("\n")]
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if len(ended) < len(lines):
        last = {"line": lines[len(ended)], "code": status, "text": "", "attempts": [], "seconds": float(HANG)}
        ended.append(last)
    return ended


def _run_all(
    main: Callable[[list[str]], int], lines: Iterable[str], folder: Path, closed: Sequence[str], pipe: Any
) -> None:
    pages = int(Path("/proc/self/statm").read_text("ascii").split()[0])
    limit = pages * resource.getpagesize() + SPACE
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    attempts: list[str] = []
    note_attempts(folder, closed, attempts)
    for line in lines:
        screen = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")  # strict: half of a surrogate pair can't be printed
        begun = time.monotonic()
        signal.setitimer(signal.ITIMER_REAL, HANG)
        with contextlib.redirect_stdout(screen), contextlib.redirect_stderr(screen):
            code = main(shlex.split(line))
        signal.setitimer(signal.ITIMER_REAL, 0)
        screen.flush()
        text = screen.buffer.getvalue().decode()  # type: ignore[attr-defined]
        ended = {"line": line, "code": code, "text": text, "attempts": attempts, "seconds": time.monotonic() - begun}
        pipe.write(json.dumps(ended) + "\n")
        pipe.flush()
        attempts.clear()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _serve()
