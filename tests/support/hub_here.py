"""The command line in this process, its Hub client talking to a Hub on loopback: a test takes a tenth of a second."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import ssl
import subprocess
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import huggingface_hub.utils
import pytest
from huggingface_hub import constants

from converter.cli import main
from converter.sources.hub import mirror as hub_mirror
from fake_hub import TOKEN, FakeHub


class HasAddress(Protocol):
    """A Hub, or what answers as one."""

    url: str


_context = functools.cache(ssl.create_default_context)
"""Reading all certificates takes longer than most commands here, whose Hub has none."""


@contextlib.contextmanager
def client_of(hub: HasAddress, home: Path) -> Iterator[None]:
    """The client asks this hub and keeps its cache in `home`; it waits no second between tries."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [n for n in os.environ if n.startswith("HF_") or "proxy" in n.lower()]:
            patch.delenv(name)
        patch.setenv("HF_TOKEN", TOKEN)
        patch.setenv("TMPDIR", str(home))
        patch.setattr("tempfile.tempdir", str(home))
        patch.setattr(constants, "ENDPOINT", hub.url)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        patch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
        patch.setattr(ssl, "create_default_context", _context)
        sleep = time.sleep
        patch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.01)))
        hub_mirror.workspace.cache_clear()
        try:
            yield
        finally:
            hub_mirror.forget()
            huggingface_hub.utils.close_session()  # type: ignore[attr-defined]


def run(*arguments: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    """A command line; the token is in none of its output, and nothing is a bug."""
    words = [str(a) for a in arguments]
    out, err = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", "Use 'content=", DeprecationWarning)  # the client's, about itself
        for name, value in env.items():
            patch.setenv(name, value)
        patch.setattr("sys.argv", ["rlhf-convert", *words])
        try:
            code = main(words)
        except SystemExit as stop:
            code = int(stop.code or 0)
    assert code != 70, err.getvalue()
    assert TOKEN not in out.getvalue() + err.getvalue()
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())


def published(hub: FakeHub, repo: str, revision: str = "main") -> dict[str, bytes]:
    """Files of a repository, but for the one that every new repository has."""
    commit = hub.repos[repo].commit(revision)
    assert commit is not None
    return {n: f.content for n, f in commit.files.items() if n != ".gitattributes"}


def commits(hub: FakeHub, repo: str) -> int:
    """Commits on main, but for the first, empty one."""
    return len(hub.repos[repo].branches["main"]) - 1


def on_disk(folder: Path) -> dict[str, bytes]:
    """Files of a folder."""
    return {p.name: p.read_bytes() for p in folder.iterdir()}
