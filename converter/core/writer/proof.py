"""The proof after writing: headers read again, sizes and index compared, sampled pieces computed or read anew."""

from __future__ import annotations

import hashlib
import io
import os
import struct
import zipfile
from pathlib import Path
from typing import BinaryIO

from converter.core.checkpoint import SideFile
from converter.core.compute.evaluate import as_bytes, evaluator
from converter.core.files.reading import InputFiles
from converter.core.formats.safetensors_io import read_header
from converter.core.formats.torch_container import Window
from converter.core.tensors.nodes import rows
from converter.core.writer.plan import Plan
from converter.core.writer.shard_plan import Entry, ShardPlan
from converter.errors import VerificationFailed
from converter.text import show

SAMPLES = 24
"""Pieces of the output that are compared with what they should be."""

COPY_SAMPLE = 1 << 20
"""Bytes of a copied tensor that a sample compares; also what is held of the output while it is compared."""


def check_written(plan: Plan, folder: Path, files: InputFiles) -> tuple[int, int]:
    """Compare what is on disk with the plan; (tensors found in headers, pieces compared byte by byte).

    Raises:
        VerificationFailed: a size, a header, a side file or a sampled piece differs; names it.
    """
    reread = sum(_check_header(shard, folder / shard.file) for shard in plan.shards)
    for name, file in plan.side_files.items():
        _check_side_file(folder / name, file)
    samples = _samples(plan)
    for shard, entry, digest in samples:
        _check_piece(folder / shard.file, entry, digest, files, plan.device)
    return reread, len(samples)


def _check_header(shard: ShardPlan, path: Path) -> int:
    if shard.is_torch:
        return _check_directory(shard, path)
    header = read_header(path)
    expected = {e.name: (e.tensor.info, e.offset - len(shard.header)) for e in shard.entries}
    found = {name: (info, begin) for name, (info, begin, _) in header.tensors.items()}
    if header.file_size != shard.size or found != expected:
        raise _failed(path, "the header on disk is not the one that was planned")
    return len(found)


def _check_directory(shard: ShardPlan, path: Path) -> int:
    """A torch file as another reader of zip finds it: every record under its name, at its place, with its size."""
    with path.open("rb") as file:
        head = file.read(len(shard.header))
        is_whole = path.stat().st_size == shard.size and head == shard.header
        for start, planned, _ in shard.archives:
            part = io.BufferedReader(Window(file.fileno(), start, start + planned.size))
            try:
                with zipfile.ZipFile(part) as archive:
                    listed = archive.infolist()
            except (zipfile.BadZipFile, OSError, ValueError) as error:
                raise _failed(path, f"the zip on disk can't be read ({show(error)})") from error
            found = [
                (i.filename.encode(), i.header_offset, _data_offset(part, i.header_offset), i.file_size) for i in listed
            ]
            is_whole = is_whole and found == [(r.name, r.start, r.offset, r.size) for r in planned.records]
    if not is_whole:
        raise _failed(path, "the zip on disk is not the one that was planned")
    return len(shard.entries)


def _data_offset(file: BinaryIO, start: int) -> int:
    """Where the data of a record begins, by its own header."""
    file.seek(start + 26)
    name_length, extra_length = struct.unpack("<HH", file.read(4).ljust(4))
    return start + 30 + int(name_length) + int(extra_length)


def _check_side_file(path: Path, file: SideFile) -> None:
    """The index and the config byte by byte; what was copied by its size."""
    if file.content is None:
        differs = path.stat().st_size != os.stat(file.source or "").st_size
    else:
        differs = path.read_bytes() != file.content
    if differs:
        raise _failed(path, "the file on disk is not what was written")


def _samples(plan: Plan) -> list[tuple[ShardPlan, Entry, int]]:
    """Tensors spread by a hash of their names, with that hash: the same ones for the same plan.

    None of files that are links: a comparison with their source would be one of a file with itself.
    """
    pieces = []
    for shard in plan.written:
        for entry in shard.entries:
            if entry.length:
                digest = hashlib.sha256(entry.name.encode(errors="surrogatepass")).digest()
                pieces.append((entry.runs is not None, int.from_bytes(digest[:8], "big"), shard, entry))
    pieces.sort(key=lambda p: p[:2])
    computed = [p for p in pieces if not p[0]][: SAMPLES * 3 // 4]
    copied = [p for p in pieces if p[0]][: SAMPLES - len(computed)]
    return [(shard, entry, digest) for _, digest, shard, entry in (*computed, *copied)]


def _check_piece(path: Path, entry: Entry, digest: int, files: InputFiles, device: str | None) -> None:
    """One chunk of a computed tensor, or a stretch of a copied one; the digest says which."""
    if entry.runs is not None:
        number = digest % len(entry.runs)
        run = entry.runs[number]
        skip = digest % max(run.length - COPY_SAMPLE + 1, 1)
        buffer = bytearray(min(run.length, COPY_SAMPLE))
        if run.file:
            files.read_into(run.file, run.offset + skip, buffer)
        expected = memoryview(buffer)
        offset = entry.offset + sum(r.length for r in entry.runs[:number]) + skip
    else:
        chunks = entry.chunks()
        start, stop = chunks[digest % len(chunks)]
        shape = entry.matrix.info.shape
        piece = entry.matrix if not shape or stop - start == shape[0] else rows(entry.matrix, start, stop)
        computes = evaluator(entry.matrix, files, device, shares=False)
        expected = as_bytes(computes.evaluate(piece, {}))
        offset, _ = entry.extents[digest % len(chunks)]
    if not _is_on_disk(path, offset, expected):
        raise _failed(path, f"{show(entry.name)} on disk differs from what was computed")


def _is_on_disk(path: Path, offset: int, expected: memoryview) -> bool:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        # From the disk, not from the memory of having written it.
        os.posix_fadvise(fd, offset, len(expected), os.POSIX_FADV_DONTNEED)
        for at in range(0, len(expected), COPY_SAMPLE):
            # As bytes: two of those are compared at once, a view element by element.
            wanted = bytes(expected[at : at + COPY_SAMPLE])
            if os.pread(fd, len(wanted), offset + at) != wanted:
                return False
    finally:
        os.close(fd)
    return True


def _failed(path: Path, what: str) -> VerificationFailed:
    return VerificationFailed(
        "written-differs",
        f"{what}; nothing was published",
        where=show(path),
        next="run the same command again with --no-resume; if it fails again, suspect the disk or the memory",
    )
