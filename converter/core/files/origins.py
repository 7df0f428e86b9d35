"""Where the bytes of a file are that is here in part: what stands for its content there, and how they are asked for."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

PART = 1 << 20
"""Bytes of one request, about, which are held in memory."""

IN_FLIGHT = 8
"""Requests at a time, of all files together."""

Fetch = Callable[[int, int], bytes]
"""The bytes from a first offset up to a last one that is not included."""


@dataclass(frozen=True)
class Origin:
    """Where a file is on the Hub, and what stands for its content there: `sha256`, else git's own `blob_id`.

    An object store lists no digest that can be relied on; `mark` stands for the object's state there, in hexadecimal.
    """

    repo_id: str
    commit: str
    name: str
    sha256: str | None
    blob_id: str
    xet_hash: str | None = None
    mark: str | None = None

    @property
    def digest(self) -> str:
        """Whichever stands for the content."""
        return self.sha256 or self.mark or self.blob_id

    def lists(self, content: bytes) -> bool:
        """Whether a whole content is the listed one, as far as something is listed."""
        if self.mark is not None:
            return True
        if self.sha256 is not None:
            return hashlib.sha256(content).hexdigest() == self.sha256
        raw = b"blob %d\0" % len(content) + content
        return hashlib.sha1(raw, usedforsecurity=False).hexdigest() == self.blob_id


def fetch_parts(fetch: Fetch, start: int, stop: int, put: Callable[[bytes, int], None]) -> None:
    """Fetch a stretch by several requests at a time; `put` is given each part and its offset, from several threads."""

    def bring(at: int) -> None:
        end = min(at + PART, stop)
        content = fetch(at, end)
        assert len(content) == end - at
        put(content, at)

    starts = range(start, stop, PART)
    if len(starts) == 1:
        bring(start)
        return
    for future in [_requests().submit(bring, at) for at in starts]:
        future.result()


@functools.cache
def _requests() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(IN_FLIGHT, thread_name_prefix="fetch")
