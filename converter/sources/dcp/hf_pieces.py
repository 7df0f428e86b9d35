"""Pieces of HuggingFaceStorageWriter: each rank's part of every tensor as safetensors, with its offsets in the header.

No file says how many ranks there were. Pieces that leave a gap are refused here; where the last ranks' files are gone,
what is left is smaller than what config.json implies, which is compared before anything is written: so a config whose
family is known is needed.

Source: https://github.com/pytorch/pytorch/blob/v2.13.0/torch/distributed/checkpoint/hf_storage.py and _hf_utils.py
(`SHARDED_FILE_NAME`, `CUSTOM_METADATA_KEY`, `SAVED_OFFSETS_KEY`); NeMo-RL's DTensor workers of the second generation
save with it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from converter.core.files.opening import Identity
from converter.core.files.strict_json import parse_json
from converter.core.formats.safetensors_io import Header, read_header
from converter.core.tensors.dtypes import DType
from converter.core.tensors.nodes import LazyTensor, Stored
from converter.errors import Refused
from converter.sources.dcp.chunks import tiled
from converter.sources.dcp.files import PIECE
from converter.sources.dcp.metadata import Chunk
from converter.text import fold, show

_OFFSETS = "DCP_SHARDING_INFO"
WORDS = "pieces of HuggingFaceStorageWriter"


@dataclass(frozen=True)
class HfPieces:
    """Tensors put together of the pieces that are there, and what they were read from."""

    tensors: dict[str, LazyTensor]
    inputs: dict[str, Identity]
    digest: str


@dataclass
class _Boxes:
    """Pieces of one tensor, by where they begin."""

    dtype: DType
    boxes: list[tuple[Chunk, LazyTensor]] = field(default_factory=list)


def read_pieces(folder: Path, names: frozenset[str]) -> HfPieces:
    """Every tensor as far as its pieces reach.

    Raises:
        Refused: a file of a rank is missing (`dcp-file-missing`), pieces leave gaps or overlap (`dcp-chunks`), or a
            header that does not say where its pieces begin (`dcp-record`).
    """
    files = sorted(n for n in names if PIECE.fullmatch(n))
    _expect_every_file(folder, files)
    found: dict[str, _Boxes] = {}
    inputs: dict[str, Identity] = {}
    digest = hashlib.sha256()
    for file in files:
        path = folder / file
        header = read_header(path, root=folder)
        inputs[str(path.absolute())] = header.identity
        digest.update(header.raw)
        offsets = _offsets(path, header)
        for name, (info, begin, _) in header.tensors.items():
            if name not in offsets or len(offsets[name]) != len(info.shape):
                raise _unrecorded(path, f"where the piece of {show(name)} begins is not in the header")
            stored = Stored(info, str(path.absolute()), header.data_start + begin)
            boxes = found.setdefault(name, _Boxes(info.dtype))
            if boxes.dtype is not info.dtype:
                raise _unrecorded(path, f"pieces of {show(name)} are of two dtypes: files of several saves")
            boxes.boxes.append((Chunk(offsets[name], info.shape), stored))
    return HfPieces(
        {name: _whole(folder, name, each.boxes) for name, each in found.items()}, inputs, digest.hexdigest()
    )


def _expect_every_file(folder: Path, files: list[str]) -> None:
    """Each rank's files count themselves: `00001-of-00002`."""
    missing = []
    for rank in sorted({m["rank"] for f in files if (m := PIECE.fullmatch(f))}):
        own = [m for f in files if (m := PIECE.fullmatch(f)) and m["rank"] == rank]
        counts = {m["files"] for m in own}
        if len(counts) > 1:
            text = f"the files of rank {int(rank) - 1} count {' and '.join(sorted(counts))}: files of several saves"
            raise Refused("dcp-chunks", text, where=show(folder))
        there = {int(m["file"]) for m in own}
        total = counts.pop()
        missing += [
            f"shard-{rank}-model-{n:05d}-of-{total}.safetensors" for n in range(1, int(total) + 1) if n not in there
        ][:8]
    if missing:
        raise Refused(
            "dcp-file-missing",
            f"{len(missing)} files are missing: {fold(missing)}",
            where=show(folder),
            next="copy them from the nodes that wrote them; nothing else holds these values",
        )


def _offsets(path: Path, header: Header) -> Mapping[str, tuple[int, ...]]:
    """Where each piece begins in its tensor."""
    text = header.metadata.get(_OFFSETS)
    if text is None:
        raise _unrecorded(path, "the header does not say which pieces these are")
    value: Any = parse_json(text.encode(), where=show(path))
    found: dict[str, tuple[int, ...]] = {}
    for name, entry in value.items() if isinstance(value, dict) else ():
        offsets = entry.get("saved_offsets") if isinstance(entry, dict) else None
        if not isinstance(offsets, list) or not all(type(n) is int and 0 <= n < 2**62 for n in offsets):
            raise _unrecorded(path, f"the header gives no offsets for {show(name)}")
        found[name] = tuple(offsets)
    return found


def _unrecorded(path: Path, what: str) -> Refused:
    return Refused("dcp-record", what, where=show(path), expected=f"{_OFFSETS} as HuggingFaceStorageWriter writes it")


def _whole(folder: Path, name: str, boxes: list[tuple[Chunk, LazyTensor]]) -> LazyTensor:
    """The box from the origin to where the pieces end, filled by them exactly; equal replicas count once."""
    once: dict[Chunk, LazyTensor] = {}
    for chunk, tensor in boxes:
        once.setdefault(chunk, tensor)
    filled = [(chunk, tensor) for chunk, tensor in once.items() if 0 not in chunk.sizes] or list(once.items())[:1]
    dims = range(len(filled[0][0].sizes))
    ends = tuple(max(c.offsets[d] + c.sizes[d] for c, _ in filled) for d in dims)
    found = tiled(filled, Chunk((0,) * len(ends), ends))
    if found is None:
        listed = ", ".join(f"{list(c.offsets)}+{list(c.sizes)}" for c, _ in filled[:8])
        text = f"the pieces of {show(name)} leave gaps or overlap: {listed}; files of some ranks are missing"
        raise Refused("dcp-chunks", text, where=show(folder), next="copy the files of all ranks into the folder")
    return found
