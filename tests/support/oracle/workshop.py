"""A sound base and a sound adapter to break, and the assertion that a run refused and wrote nothing."""

from __future__ import annotations

import atexit
import dataclasses
import functools
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from oracle.adapters import CONFIG, make_adapter, rewrite_adapter
from oracle.bases import Base, edit_config, make_base
from oracle.command import Ran, listing, run


@functools.cache
def _sound() -> tuple[Path, Base]:
    """The sound pair, made once for all tests of a process; each gets its own copy."""
    keep = Path(tempfile.mkdtemp(prefix="sound-"))
    atexit.register(shutil.rmtree, keep, ignore_errors=True)
    base = make_base(keep / "base", sharded=True)
    make_adapter(keep / "adapter", base)
    return keep, base


class Workshop:
    """A folder with a base, an adapter over it, and the place where an output would be."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        keep, base = _sound()
        shutil.copytree(keep, folder, dirs_exist_ok=True)
        self.base = dataclasses.replace(base, path=folder / "base")
        self.adapter = folder / "adapter"
        self.out = folder / "out"

    def changed(self, change: Callable[[dict[str, Any]], dict[str, Any] | None]) -> Path:
        return rewrite_adapter(self.adapter, self.folder / "changed", change=change)

    def configured(self, **changes: Any) -> Path:
        shutil.copytree(self.adapter, self.folder / "configured")
        edit_config(self.folder / "configured", CONFIG, **changes)
        return self.folder / "configured"

    def refuses(
        self, adapter: Path, *more: object, words: tuple[str, ...], code: int = 3, base: Path | None = None
    ) -> Ran:
        before = listing(self.folder)
        ran = run("merge-lora", adapter, self.out, "--base", base or self.base.path, *more)
        assert ran.code == code, f"exit {ran.code}\n{ran.out}\n{ran.err}"
        missing = [word for word in words if word.lower() not in ran.text.lower()]
        assert not missing, f"{missing} not in:\n{ran.err}"
        assert "Traceback" not in ran.text
        assert listing(self.folder) == before
        return ran
