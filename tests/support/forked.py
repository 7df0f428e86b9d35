"""Command lines in forked children of one process that has imported everything: a run costs a twentieth of a second.

Run as a program, this module is that process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from durability import Call, Death, copy_inputs, fast_folder


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a child ended: its exit code, or minus the number of the signal that killed it."""

    code: int
    err: str
    seconds: float
    reached: bool  # the call at which it was to die
    calls: tuple[Call, ...]  # all that it made, where it was not killed


class Server:
    """A process that has imported everything and runs each command line in a forked child."""

    def __init__(self) -> None:
        command = [sys.executable, str(Path(__file__)), "serve"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(
        self,
        *arguments: object,
        folder: Path,
        die_at: int | Call | None = None,
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
            "argv": [str(a) for a in arguments], "folder": str(folder), "kill": kill, "file_size": file_size,
            "die_at": dataclasses.astuple(die_at) if isinstance(die_at, Call) else die_at,
        }  # fmt: skip
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        ended = json.loads(self._process.stdout.readline())
        return Ended(**ended | {"calls": tuple(Call(*each) for each in ended["calls"])})

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
    die_at: int | list[Any] | None,
    kill: tuple[int, float] | None,
    file_size: int | None,
) -> dict[str, Any]:
    log, unfinished, record = (
        Path(folder).parent / f"{Path(folder).name}.{name}" for name in ("stderr", "unfinished", "calls")
    )
    log.touch()
    at = Call(*die_at) if isinstance(die_at, list) else -1 if die_at is None else die_at
    begun = time.monotonic()
    child = os.fork()
    if child == 0:
        code = 70
        try:
            # The server ignores it, so that Ctrl-C on a terminal ends the tests and not their server.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            _redirect(log)
            os.chdir(folder)
            if file_size is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
            with Death(Path(folder), at=at) as death:
                code = main(argv)
            # Whole or not at all: the signal may come while it is written.
            unfinished.write_text(json.dumps([dataclasses.astuple(each) for each in death.calls]))
            unfinished.rename(record)
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
    calls = json.loads(record.read_text()) if record.exists() else []
    record.unlink(missing_ok=True)
    unfinished.unlink(missing_ok=True)
    return {
        "code": status, "err": err, "seconds": time.monotonic() - begun, "reached": status == 9, "calls": calls
    }  # fmt: skip


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
