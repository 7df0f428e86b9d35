"""Files of an output that are symbolic links to files of its source, where the user asked for that.

A link that leaves its folder is refused wherever folders are read, since it may lead to anything. These are told from
others by the receipt, which records the size and the header's digest of the file that each was made for: a folder can
name no file whose header its maker did not know.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import struct
from pathlib import Path
from typing import Any

from converter.core.files.names import RECEIPT

LINKED = "linked"
"""Key of the receipt: file names mapped to `size` in bytes and `header`, the sha256 of the header's bytes."""

MOST_RECEIPT = 64_000_000
MOST_HEADER = 100_000_000


def header_digest(raw: bytes) -> str:
    """sha256 of a safetensors header, its length field included."""
    return hashlib.sha256(raw).hexdigest()


def recorded(name: str, root: Path) -> dict[str, Any] | None:
    """What the receipt in `root` says of the link of that name; None where it says nothing."""
    receipt = root / RECEIPT
    try:
        status = os.lstat(receipt)
    except OSError:
        return None
    found = _recorded(str(receipt), status.st_mtime_ns, status.st_size, status.st_ino, os.path.isfile(receipt))
    entry = found.get(name)
    return entry if isinstance(entry, dict) else None


@functools.lru_cache(maxsize=64)
def _recorded(receipt: str, _time: int, size: int, _inode: int, is_file: bool) -> dict[str, Any]:
    if not is_file or os.path.islink(receipt) or size > MOST_RECEIPT:
        return {}
    try:
        value = json.loads(Path(receipt).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    linked = value.get(LINKED) if isinstance(value, dict) else None
    return linked if isinstance(linked, dict) else {}


def is_as_recorded(fd: int, entry: dict[str, Any]) -> bool:
    """True where an open file has the size and the header that the receipt records."""
    if os.fstat(fd).st_size != entry.get("size"):
        return False
    start = os.pread(fd, 8, 0)
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else MOST_HEADER + 1
    if length > MOST_HEADER:
        return False
    digest = hashlib.sha256()
    for at in range(0, 8 + length, 1 << 20):
        digest.update(os.pread(fd, min(1 << 20, 8 + length - at), at))
    return digest.hexdigest() == entry.get("header")
