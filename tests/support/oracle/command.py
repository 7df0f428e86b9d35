"""The command line under test, called in process, and what a folder holds before and after."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Ran:
    """One run of the command line."""

    code: int
    out: str
    err: str

    @property
    def text(self) -> str:
        """Everything that was printed, on one line, so that a wrapped sentence can be found in it."""
        return " ".join((self.out + " " + self.err).split())


def run(*arguments: object) -> Ran:
    """`rlhf-convert ARGUMENTS`, in this process."""
    from converter.cli import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(a) for a in arguments])
    return Ran(code, out.getvalue(), err.getvalue())


def merged(*arguments: object) -> Ran:
    """`rlhf-convert merge-lora ARGUMENTS`, which must succeed."""
    ran = run("merge-lora", *arguments)
    assert ran.code == 0, f"exit {ran.code}\n{ran.out}\n{ran.err}"
    return ran


def listing(folder: Path) -> dict[str, str]:
    """Every path under a folder with the digest of its content."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else "folder"
        for p in sorted(folder.rglob("*"))
    }
