"""A shard's file: its blocks reserved, its checksums taken, its archive closed, and recognised by its journal line."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from converter.core.files.checksums import crc32, joined
from converter.core.formats import torch_zip_writer as torch_zip
from converter.core.writer.copying import checksum, new_buffer, write_all
from converter.core.writer.shard_plan import ShardPlan

_NO_FALLOCATE = {errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS}


def reserve(fd: int, size: int) -> None:
    """Ask for a file's blocks at once, so that a full disk shows before the work; not all filesystems can."""
    try:
        os.posix_fallocate(fd, 0, size)
    except (AttributeError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_FALLOCATE:
            raise
        os.ftruncate(fd, size)


def whole_checksum(fd: int, shard: ShardPlan, sums: Sequence[int]) -> int:
    """CRC-32 of a file whose tensors have the CRC-32 `sums`: joined from them where nothing else lies between."""
    if shard.is_torch:
        return checksum(fd, 0, shard.size, buffer=new_buffer())
    found = crc32(shard.header)
    for entry, crc in zip(shard.entries, sums, strict=True):
        found = joined(found, crc, entry.length)
    return found


def close_archive(fd: int, shard: ShardPlan, sums: Sequence[int]) -> None:
    """Write what a torch file has around its tensors, whose CRC-32 are `sums`."""
    for offset, data in _around(shard, sums):
        write_all(fd, data, offset)


def _around(shard: ShardPlan, sums: Sequence[int]) -> Iterator[tuple[int, bytes]]:
    """All of a torch file but tensors and the shard's own tail, at its offsets."""
    for start, archive, own in shard.archives:
        yield start, archive.head
        for offset, data in torch_zip.closing(archive, sums[own]):
            yield start + offset, data


def is_still_there(shard: ShardPlan, line: Mapping[str, Any], folder: Path) -> bool:
    """True where a journalled shard is on disk with its size, its header and the checksums of its computed tensors."""
    try:
        fd = os.open(folder / shard.file, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        if os.fstat(fd).st_size != shard.size or os.pread(fd, len(shard.header), 0) != shard.header:
            return False
        computed = [entry for entry in shard.entries if entry.runs is None]
        buffer = new_buffer()
        if not all(line["crc"].get(e.name) == [checksum(fd, *at, buffer=buffer) for at in e.extents] for e in computed):
            return False
        sums = line.get("sums")
        if not isinstance(sums, list) or len(sums) != len(shard.entries):
            return False
        if not all(type(n) is int and 0 <= n < 1 << 32 for n in (*sums, line.get("whole"))):
            return False
        return not shard.is_torch or _is_closed(fd, shard, sums)
    finally:
        os.close(fd)


def _is_closed(fd: int, shard: ShardPlan, sums: Sequence[int]) -> bool:
    """True where the archive says of its tensors what the journal says, and what follows it is there."""
    tail = (shard.size - len(shard.tail), shard.tail)
    return all(os.pread(fd, len(data), offset) == data for offset, data in (*_around(shard, sums), tail))
