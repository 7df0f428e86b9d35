"""What a Hub on loopback holds: repositories, commits, files; and the faults that are planned for it."""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Fault:
    """What goes wrong with requests whose `METHOD path` matches, `count` times.

    Attributes:
        kind: an HTTP status as a string; `drop`: the connection closes before an answer; `lost`: it is done, and the
            connection closes before the answer; `corrupt`: one byte of the answer's body is another; `short`: the body
            ends early; `whole`: the answer knows no ranges; `moved`: it is of another commit;
            `spoilt`: one byte that came is another;
            `echo`: an error that quotes the request's headers.
        skip: requests that go well first.
    """

    request: str
    kind: str
    count: int = 1
    skip: int = 0


def due(faults: Iterable[Fault], request: str) -> Fault | None:
    """The fault that happens to this request, counted down."""
    for each in faults:
        if each.count and re.search(each.request, request):
            if each.skip:
                each.skip -= 1
                return None
            each.count -= 1
            return each
    return None


@dataclass
class Stored:
    """A file of a commit."""

    content: bytes
    lfs: bool

    @functools.cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @functools.cached_property
    def blob_id(self) -> str:
        """git's own name of it; of an LFS file, of its pointer."""
        raw = self.content
        if self.lfs:
            raw = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(raw)}\n".encode()
        return hashlib.sha1(b"blob %d\0" % len(raw) + raw, usedforsecurity=False).hexdigest()


@dataclass
class Commit:
    """A state of a repository."""

    oid: str
    files: dict[str, Stored]
    summary: str = ""


@dataclass
class Repo:
    """A repository: every branch's commits, oldest first; `objects` are the large contents that it may name."""

    private: bool
    objects: set[str] = field(default_factory=set)
    branches: dict[str, list[Commit]] = field(default_factory=dict)

    def commit(self, revision: str) -> Commit | None:
        """The commit of a branch or of an id."""
        if revision in self.branches:
            return self.branches[revision][-1]
        every = [c for commits in self.branches.values() for c in commits]
        return next((c for c in every if c.oid == revision), None)


def entry_of(path: str, file: Stored) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(file.content), "oid": file.blob_id}
    if file.lfs:
        entry["lfs"] = {"oid": file.sha256, "size": len(file.content), "pointerSize": 134}
        entry["xetHash"] = hashlib.sha256(b"xet" + file.sha256.encode()).hexdigest()
    return entry
