"""The proof after writing: headers read again, sizes and index compared, sampled pieces computed or read anew."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from converter.errors import VerificationFailed, show
from converter.evaluate import Evaluator
from converter.plan import Entry, Plan, ShardPlan
from converter.reading import InputFiles
from converter.safetensors_io import read_header
from converter.tensors import LazyTensor, rows

SAMPLES = 24
"""Pieces of the output that are compared with what they should be."""

COPY_SAMPLE = 1 << 20
"""Bytes of a copied tensor that a sample compares."""


def check_written(plan: Plan, folder: Path, files: InputFiles) -> tuple[int, int]:
    """Compare what is on disk with the plan; (tensors found in headers, pieces compared byte by byte).

    Raises:
        VerificationFailed: a size, a header or a sampled piece differs; names it.
    """
    reread = sum(_check_header(shard, folder / shard.file) for shard in plan.shards)
    samples = _samples(plan)
    for shard, entry, index in samples:
        _check_piece(folder / shard.file, entry, index, files)
    return reread, len(samples)


def _check_header(shard: ShardPlan, path: Path) -> int:
    header = read_header(path)
    expected = {e.name: (e.tensor.info, e.offset - len(shard.head)) for e in shard.entries}
    found = {name: (info, begin) for name, (info, begin, _) in header.tensors.items()}
    if header.file_size != shard.size or found != expected:
        raise _failed(path, "the header on disk is not the one that was planned")
    return len(found)


def _samples(plan: Plan) -> list[tuple[ShardPlan, Entry, int]]:
    """Pieces spread over the tensors by a hash of their names: the same ones for the same plan."""
    pieces = []
    for shard in plan.shards:
        for entry in shard.entries:
            if entry.length:
                digest = hashlib.sha256(entry.name.encode(errors="surrogatepass")).digest()
                count = len(entry.chunks()) if entry.runs is None else 1
                pieces.append((entry.runs is not None, digest, shard, entry, int.from_bytes(digest[:4], "big") % count))
    pieces.sort(key=lambda p: p[:2])
    computed = [p for p in pieces if not p[0]][: SAMPLES * 3 // 4]
    copied = [p for p in pieces if p[0]][: SAMPLES - len(computed)]
    return [(shard, entry, index) for _, _, shard, entry, index in (*computed, *copied)]


def _check_piece(path: Path, entry: Entry, index: int, files: InputFiles) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if entry.runs is not None:
            run = entry.runs[0]
            length = min(run.length, COPY_SAMPLE)
            expected = bytearray(length)
            files.read_into(run.file, run.offset, expected)
            offset = entry.offset
        else:
            start, stop = entry.chunks()[index]
            shape = entry.tensor.info.shape
            piece = entry.tensor if not shape or stop - start == shape[0] else rows(entry.tensor, start, stop)
            expected = _computed(piece, files)
            offset = entry.offset + start * (entry.length // (shape[0] if shape else 1))
        os.posix_fadvise(fd, offset, len(expected), os.POSIX_FADV_DONTNEED)
        if os.pread(fd, len(expected), offset) != bytes(expected):
            raise _failed(path, f"{show(entry.name)} on disk differs from what was computed")
    finally:
        os.close(fd)


def _computed(piece: LazyTensor, files: InputFiles) -> bytearray:
    import torch

    value = Evaluator(files).evaluate(piece, {})
    return bytearray(memoryview(value.reshape(-1).view(torch.uint8).numpy()))


def _failed(path: Path, what: str) -> VerificationFailed:
    return VerificationFailed(
        "written-differs",
        f"{what}; nothing was published",
        where=show(path),
        next="run the same command again with --no-resume; if it fails again, suspect the disk or the memory",
    )
