"""Asks the installed transformers what a class loads: in a child process, offline, once for each config.

transformers is not imported here. The child (`on_meta`) builds the model on the meta device, without values; what it
says is kept under the user's cache folder, by a digest of the class, the config and transformers' version.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import select
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, cast

PROGRAM = Path(__file__).with_name("on_meta.py")
"""What the child runs: this and nothing else."""
_FORMAT = 5
"""Of what is kept; another number is another digest."""

MOST_SECONDS = 900
"""By the clock, which also counts what other programs do on a busy machine; the child counts its own (`on_meta`)."""

MOST_BYTES = 200_000_000
_KEPT = frozenset(
    {"PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE"}
)
"""What the child has of the environment: no token."""
_SILENT = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
}
_MAKES_NO_DIFFERENCE = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "eos_token_id", "bos_token_id")


def described(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """What a class loads with a config: names and shapes in memory and on disk, ties; `unknown` says why not."""
    asked = {k: v for k, v in config.items() if k not in _MAKES_NO_DIFFERENCE}
    try:
        request = json.dumps({"class": name, "config": asked}, sort_keys=True)
    except (TypeError, ValueError):
        return {"unknown": "config.json holds what JSON does not"}
    digest = hashlib.sha256(f"{_FORMAT} {version()} {request}".encode()).hexdigest()
    if digest in _known:
        return _known[digest]
    kept = _folder() / f"{digest}.json"
    found = _read(kept)
    if found is None:
        found = _CHILD.ask(request)
        if not found.get("passing"):
            _write(kept, found)
    if len(_known) > _MOST_KNOWN:
        _known.clear()
    _known[digest] = found
    return found


_known: dict[str, dict[str, Any]] = {}
_MOST_KNOWN = 64


def version() -> str:
    """The installed transformers."""
    try:
        return metadata.version("transformers")
    except metadata.PackageNotFoundError:
        return ""


def _folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(root) / "rlhf-convert" / "expected"


def _read(file: Path) -> dict[str, Any] | None:
    try:
        if file.stat().st_size > MOST_BYTES:
            return None
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) and ("saved" in value or "unknown" in value) else None


def _write(file: Path, value: dict[str, Any]) -> None:
    """Kept for the next command; a folder that can't be written to costs time, and nothing else."""
    mine = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        mine.write_text(json.dumps(value), encoding="utf-8")
        os.replace(mine, file)
    except OSError:
        mine.unlink(missing_ok=True)


@dataclass
class _Child:
    """One process for all questions of a command; it ends with its standard input."""

    process: subprocess.Popen[bytes] | None = None
    owner: int = 0
    held: bytes = b""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def ask(self, request: str) -> dict[str, Any]:
        """The answer, or `unknown`; `passing` where another time may have an answer."""
        if not version():
            return {"unknown": "transformers is not installed", "passing": True}
        with self.lock:
            self._start()
            process = self.process
            assert process is not None
            assert process.stdin is not None
            try:
                process.stdin.write(request.encode() + b"\n")
                process.stdin.flush()
                line = self._line(process, MOST_SECONDS)
            except OSError:
                line = b""
            if not line:
                self.stop()
                return {"unknown": "transformers did not build it in time or memory", "passing": True}
            return cast("dict[str, Any]", json.loads(line))

    def _start(self) -> None:
        if self.process is not None and self.owner == os.getpid() and self.process.poll() is None:
            return
        self.process = subprocess.Popen(
            [sys.executable, "-I", str(PROGRAM)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={k: v for k, v in os.environ.items() if k in _KEPT} | _SILENT,
            cwd="/",
            start_new_session=True,
        )
        self.owner, self.held = os.getpid(), b""

    def _line(self, process: subprocess.Popen[bytes], seconds: float) -> bytes:
        assert process.stdout is not None
        handle = process.stdout.fileno()
        while b"\n" not in self.held:
            ready, _, _ = select.select([handle], [], [], seconds)
            block = os.read(handle, 1 << 20) if ready else b""
            if not block or len(self.held) > MOST_BYTES:
                return b""
            self.held += block
        line, _, self.held = self.held.partition(b"\n")
        return line

    def stop(self) -> None:
        """End the process, if this one started it."""
        process, self.process = self.process, None
        if process is None or self.owner != os.getpid():
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except OSError:
                    continue


_CHILD = _Child()
atexit.register(_CHILD.stop)
