"""The checksums that the receipt records against the bytes that are here: one that was flipped since is found."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converter.core.files import sparse
from converter.core.files.checksums import crc32
from converter.core.files.names import FILES
from converter.core.files.opening import open_input
from converter.core.tensors.byte_runs import byte_runs
from converter.core.tensors.nodes import LazyTensor
from converter.errors import ConvertError
from converter.examine.verify.check import Check, fails, holds, note
from converter.text import fold, format_size, show

BLOCK = 1 << 22
"""Bytes that each thread holds."""

AGAIN = "copy the folder again from where it was written, or write it again"


@dataclass(frozen=True)
class _Recorded:
    """What the receipt says of a file."""

    name: str
    size: int
    crc: str
    tensors: Mapping[str, str]


def check_checksums(
    root: Path, receipt: Mapping[str, Any], stored: Callable[[], Mapping[str, LazyTensor]]
) -> list[Check]:
    """Whether every byte of the weights is the one that was written.

    A file that is as it was written is read once, in one piece. Of one that is not, or is gone, tensors are compared by
    their names, wherever they lie now.

    Args:
        receipt: the folder's own.
        stored: gives the folder's tensors as they lie on disk.
    """
    recorded = list(_files(receipt.get(FILES)))
    if not recorded:
        text = "the receipt has no checksums: what was changed in values since can't be seen"
        return [note("bytes", "checksums-missing", text)]
    if any(root.is_relative_to(each) for each in sparse.folders):
        text = "the weights are on the Hub, and were not read for the receipt's checksums"
        return [note("bytes", "checksums-unread", text)]
    with ThreadPoolExecutor(thread_name_prefix="checksum") as pool:
        same = dict(zip([r.name for r in recorded], pool.map(lambda r: _is_same(root, r), recorded), strict=True))
    changed = [r for r in recorded if not same[r.name]]
    if not changed:
        size = format_size(sum(r.size for r in recorded))
        return [holds("bytes", f"{size} in {len(recorded)} files, equal in CRC-32 to what was written")]
    tensors = stored()
    pairs = [(n, crc) for r in changed for n, crc in r.tensors.items() if n in tensors]
    differ = [n for n, crc in pairs if _checksum_of(tensors[n]) != crc]
    if differ:
        text = f"{len(differ)} of {len(pairs)} tensors have other values than were written: {fold(differ)}"
        return [fails("bytes", "values-changed", text, AGAIN)]
    if there := [r.name for r in changed if (root / r.name).is_file()]:
        text = f"{fold([show(n) for n in there])}: the header is not the one that was written"
        return [fails("bytes", "values-changed", text, AGAIN)]
    return [note("bytes", "files-renamed", f"{len(pairs)} tensors are equal to what was written, in other files")]


def _files(value: Any) -> Iterator[_Recorded]:
    """The well-formed entries."""
    for name, entry in value.items() if isinstance(value, dict) else ():
        tensors = entry.get("tensors") if isinstance(entry, dict) else None
        if isinstance(tensors, dict) and isinstance(entry.get("size"), int) and isinstance(entry.get("crc32"), str):
            yield _Recorded(name, entry["size"], entry["crc32"], tensors)


def _is_same(root: Path, recorded: _Recorded) -> bool:
    try:
        fd = open_input(root / recorded.name, root=root)
    except ConvertError:
        return False
    try:
        size = os.fstat(fd).st_size
        return size == recorded.size and f"{_checksum(fd, 0, size, 0):08x}" == recorded.crc
    finally:
        os.close(fd)


def _checksum(fd: int, offset: int, length: int, start: int) -> int:
    """CRC-32 that goes on from `start`."""
    view = memoryview(bytearray(min(BLOCK, length)))
    found, at, stop = start, offset, offset + length
    while at < stop:
        count = os.preadv(fd, [view[: stop - at]], at)
        if not count:
            break
        found, at = crc32(view[:count], found), at + count
    return found


def _checksum_of(tensor: LazyTensor) -> str:
    """CRC-32 of a stored tensor; empty where its bytes lie nowhere as they are."""
    runs = byte_runs(tensor)
    if runs is None:
        return ""
    found = 0
    for run in runs:
        fd = open_input(Path(run.file))
        try:
            found = _checksum(fd, run.offset, run.length, found)
        finally:
            os.close(fd)
    return f"{found:08x}"
