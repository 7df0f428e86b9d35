"""Checksums that a container records of its tensors' bytes, compared before anything is published."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from converter.core.checkpoint import RecordCheck
from converter.core.files.checksums import crc32, joined
from converter.core.files.reading import InputFiles
from converter.errors import Refused
from converter.text import show

BLOCK = 1 << 22
"""Bytes that each thread holds."""


def compare_records(checks: Sequence[RecordCheck], files: InputFiles, jobs: int) -> None:
    """Compare the CRC-32 of every record that the run used: of its bytes as they were read, and the rest is read here.

    Raises:
        Refused: one differs (`input-corrupt`); names the file.
    """
    if not checks:
        return
    with ThreadPoolExecutor(max_workers=jobs, thread_name_prefix="checksum") as pool:
        for check, found in zip(checks, pool.map(lambda c: _checksum(c, files), checks), strict=True):
            if found != check.crc:
                raise Refused(
                    "input-corrupt",
                    f"bytes {check.offset} to {check.offset + check.length} fail the checksum that the file records of "
                    "them: the disk or a copy damaged it; nothing was published",
                    where=show(check.file),
                    expected=f"CRC-32 {check.crc:08x}",
                    got=f"{found:08x}",
                    next="copy the file again from where it was written",
                )


def _checksum(check: RecordCheck, files: InputFiles) -> int:
    checksum, at, stop = 0, check.offset, check.offset + check.length
    for first, end, crc in [*files.sums(check.file).within(at, stop), (stop, stop, 0)]:
        checksum = _read_on(check.file, files, at, first, checksum)
        checksum = joined(checksum, crc, end - first)
        at = end
    return checksum


def _read_on(path: str, files: InputFiles, start: int, stop: int, checksum: int) -> int:
    buffer = bytearray(min(BLOCK, stop - start))
    at = start
    while at < stop:
        view = memoryview(buffer)[: min(BLOCK, stop - at)]
        files.read_into(path, at, view)
        checksum = crc32(view, checksum)
        at += len(view)
    return checksum
