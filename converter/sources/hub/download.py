"""Downloads into the Hub's cache, each file compared with the digest that the Hub lists: the client checks lengths."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from converter.core.files import sparse
from converter.core.files.opening import open_input
from converter.sources.hub.client import Kind, ListedFile, expect_safe_endpoint, list_files, refuse
from converter.text import fold, show

_BLOCK = 1 << 22


def download(
    repo_id: str, revision: str | None, token: str | None, patterns: Sequence[str], kind: Kind = "model"
) -> Path:
    """The snapshot's folder, with the files that match; those that were not there before are checked.

    Raises:
        Refused: the download failed (`hub-download`), or brought other bytes than are listed, twice
            (`download-corrupt`); what is wrong is removed from the cache.
    """
    expect_safe_endpoint()
    before: dict[str, tuple[int, int]] = {}
    for attempt in range(2):
        folder, known = _fetch(repo_id, revision, token, patterns, before, kind)
        listed = {f.name: f for f in list_files(repo_id, folder.name, token, kind)}
        new = [n for n in known if known[n] != before.get(n)]
        wrong = [n for n in new if n in listed and not _is_as_listed(folder / n, listed[n])]
        if not wrong:
            return folder
        for name in wrong:
            (folder / name).resolve().unlink(missing_ok=True)
            (folder / name).unlink(missing_ok=True)
        if attempt:
            error = sparse.corrupt(wrong[0])
            error.where = show(repo_id)
            error.got = fold([show(n) for n in wrong])
            raise error
    raise AssertionError("unreachable")


def _fetch(
    repo_id: str,
    revision: str | None,
    token: str | None,
    patterns: Sequence[str],
    before: dict[str, tuple[int, int]],
    kind: Kind,
) -> tuple[Path, dict[str, tuple[int, int]]]:
    """Let the client download; the folder, and what is in it now. `before` is told what was there."""
    import huggingface_hub

    get: Any = partial(huggingface_hub.snapshot_download, repo_type=kind)
    try:
        # What is there already: the same call without the network, which knows where.
        before |= _files(Path(get(repo_id, revision=revision, local_files_only=True, allow_patterns=[*patterns])))
    except Exception:  # nothing yet
        before |= {}
    try:
        folder = Path(get(repo_id, revision=revision, token=token, allow_patterns=[*patterns]))
    except Exception as error:  # the client's own, its transport's and the system's
        refuse(repo_id, token, error)
    return folder, _files(folder)


def _files(folder: Path) -> dict[str, tuple[int, int]]:
    """Files by name, with what tells a new one from an old one."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_file():
            status = path.stat()
            found[path.relative_to(folder).as_posix()] = (status.st_ino, status.st_mtime_ns)
    return found


def _is_as_listed(path: Path, listed: ListedFile) -> bool:
    fd = open_input(path)
    try:
        size = os.fstat(fd).st_size
        if listed.sha256 is not None:
            digest = hashlib.sha256()
        else:
            digest = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
        while block := os.read(fd, _BLOCK):
            digest.update(block)
    finally:
        os.close(fd)
    return size == listed.size and digest.hexdigest() == listed.digest
