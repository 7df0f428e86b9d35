"""A real bash whose `rlhf-convert` is answered by forked children of one process that has imported everything.

What a shell does with a line (quotes, `&&`, pipes, exit codes) is the shell's own; a command costs a twentieth of a
second. What a screen says is also recorded as values: which words of a step are commands, and which are sentences.

Run as a program, this module is that process.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

CLIENT = """#!{python} -IS
import json, os, socket, sys
s = socket.socket(socket.AF_UNIX)
s.connect({address!r})
asked = {{"argv": sys.argv, "folder": os.getcwd(), "env": dict(os.environ)}}
body = json.dumps(asked).encode()
socket.send_fds(s, [len(body).to_bytes(8, "big")], [0, 1, 2])
s.sendall(body)
sys.exit(int.from_bytes(s.recv(1), "big"))
"""

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures"

Step = dict[str, Any]
"""A part of what to do: `{"command": [...words], "text": as printed}`, or `{"text": a sentence}`."""


@dataclass(frozen=True)
class Said:
    """An error or a finding, as values.

    Attributes:
        code, text, where: what is wrong.
        severity: `error` for an error; a finding's own.
        exit: the exit code of an error; None of a finding.
        steps: the parts of what to do next, in order.
    """

    code: str
    text: str
    where: str | None
    severity: str
    exit: int | None
    steps: tuple[Step, ...]

    @property
    def commands(self) -> tuple[str, ...]:
        """The commands of its steps, as they are printed."""
        return tuple(s["text"] for s in self.steps if "command" in s)


@dataclass(frozen=True)
class Typed:
    """A line that was typed: the shell's exit code, both streams, and every error and finding that was said."""

    line: str
    code: int
    out: str
    err: str
    said: tuple[Said, ...]


class Shell:
    """Types lines into bash, in a folder."""

    def __init__(self, program: str | None = None, *, warm: bool = True) -> None:
        """Serve our program and pytest, or type for another one: the text of a script.

        Args:
            warm: tables are read once for all commands, plug-ins among them. A cold one has imported modules alone, so
                that a command finds what is installed in its own `PYTHONPATH`.
        """
        self._home = Path(tempfile.mkdtemp(prefix="shell"))
        address = self._home / "socket"
        folder = self._home / "bin"
        folder.mkdir()
        for name in ("rlhf-convert", "pytest"):
            (folder / name).write_text(program or CLIENT.format(python=sys.executable, address=str(address)))
            (folder / name).chmod(0o755)
        (folder / "python").symlink_to(sys.executable)
        self._process: subprocess.Popen[str] | None = None
        if program is not None:
            return
        command = [sys.executable, str(Path(__file__)), str(address), *(["warm"] if warm else [])]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"

    def type(self, line: str, folder: Path, **env: str) -> Typed:
        """What bash makes of a line."""
        record = self._home / "said"
        record.unlink(missing_ok=True)
        path = os.pathsep.join([str(self._home / "bin"), os.environ["PATH"]])
        done = subprocess.run(
            ["bash", "-c", line],
            cwd=folder,
            env={**os.environ, "PATH": path, "SAID": str(record), **env},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        said = [json.loads(each) for each in record.read_text().splitlines()] if record.exists() else []
        return Typed(line, done.returncode, done.stdout, done.stderr, tuple(_said(each) for each in said))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            self._process.communicate()
        shutil.rmtree(self._home)


def _said(value: dict[str, Any]) -> Said:
    return Said(**{**value, "steps": tuple(value["steps"])})


def serve(address: str, *, warm: bool) -> None:
    """Answers clients until its own input ends."""
    import pytest  # noqa: F401 - so that no child imports it
    import torch

    import converter.cli
    import converter.cli.verbs.all
    import converter.core.writer.write
    import converter.examine.doctor
    import converter.examine.verify.verify
    import converter.recipe.run
    import converter.testing

    torch.set_num_threads(1)  # no thread of torch's may be there when a child is made
    if warm:
        _warm(converter.cli.main)
    gc.collect()
    gc.freeze()
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(address)
    listening.listen()
    print("ready", flush=True)
    while True:
        client, _ = listening.accept()
        child = os.fork()
        if child == 0:
            _answer(client)
        client.close()
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def _warm(main: Callable[[list[str]], int]) -> None:
    """Read once, before there are children, the tables that every command reads."""
    run, base = str(FIXTURES / "tiny-reward-run" / "checkpoint-4"), str(FIXTURES / "tiny-qwen2-base")
    with (
        tempfile.TemporaryDirectory() as scratch,
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        for words in (
            ["doctor", run],
            ["verify", base],
            ["convert", run, f"{scratch}/rm", "--to", "openrlhf", "--role", "reward", "--base", base],
        ):
            main(words)


def _answer(client: socket.socket) -> None:
    code = 70
    try:
        size, descriptors, _, _ = socket.recv_fds(client, 8, 3)
        body = b""
        while len(body) < int.from_bytes(size, "big"):
            body += client.recv(1 << 16)
        asked = json.loads(body)
        for number, descriptor in enumerate(descriptors):
            os.dup2(descriptor, number)
            os.close(descriptor)
        sys.stdout = open(1, "w", encoding="utf-8", errors="surrogateescape", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", encoding="utf-8", errors="surrogateescape", closefd=False)  # noqa: SIM115
        os.environ.clear()
        os.environ.update(asked["env"])
        os.chdir(asked["folder"])
        given = filter(None, asked["env"].get("PYTHONPATH", "").split(os.pathsep))
        sys.path[:0] = [each for each in given if each not in sys.path]
        program, *argv = asked["argv"]
        code = _run(argv) if Path(program).name == "rlhf-convert" else _test(argv)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        client.sendall((code & 255).to_bytes(1, "big"))
        os._exit(0)


def _test(argv: list[str]) -> int:
    import pytest

    return int(pytest.main(argv))


def _run(argv: list[str]) -> int:
    from converter import cli
    from converter.examine import doctor

    shown, examined = cli.error_to_user, doctor.examine

    def error_to_user(error: Any, **rest: Any) -> int:
        _record(error.code, error.what, error.where, "error", error.exit_code, error.next)
        return shown(error, **rest)

    def examine(asked: Any) -> Any:
        report = examined(asked)
        for each in report.findings:
            _record(each.code, each.text, None, each.severity, None, each.next)
        return report

    cli.error_to_user, doctor.examine = error_to_user, examine
    sys.argv = ["rlhf-convert", *argv]
    try:
        return cli.main(argv)
    except SystemExit as stop:
        return int(stop.code or 0)


def _record(code: str, text: str, where: str | None, severity: str, exit_code: int | None, step: Any) -> None:
    from converter.diagnostic import Command, parts

    steps = [{"text": str(p)} | ({"command": list(p.words)} if isinstance(p, Command) else {}) for p in parts(step)]
    value = {"code": code, "text": text, "where": where, "severity": severity, "exit": exit_code, "steps": steps}
    with open(os.environ["SAID"], "a", encoding="utf-8") as file:
        file.write(json.dumps(value) + "\n")


if __name__ == "__main__":
    serve(sys.argv[1], warm="warm" in sys.argv[2:])
