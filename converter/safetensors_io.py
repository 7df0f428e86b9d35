"""safetensors headers and index.json: a strict reader and a canonical writer, without torch and without the library.

The library's own reader accepts a name twice (the last wins), unknown keys and unsafe names; a converter that copies
bytes by header must not. Every refusal names the file.

Source of the format: https://github.com/huggingface/safetensors/blob/v0.8.0/README.md#format
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converter.dtypes import DType, TensorInfo
from converter.errors import Refused, show
from converter.files import Identity, open_input, read_exact
from converter.strict_json import load_json, parse_json

MAX_HEADER_SIZE = 100_000_000
"""Source: `MAX_HEADER_SIZE`, https://github.com/huggingface/safetensors/blob/v0.8.0/safetensors/src/tensor.rs"""

MAX_NAME_LENGTH = 1024
MAX_DIMENSION = 2**63 - 1
_DTYPES = {d.value: d for d in DType}
_UNSAFE_NAME = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_PLAIN_FILE = re.compile(r"[A-Za-z0-9_][\w.+-]{0,254}\.safetensors", re.ASCII)


@dataclass(frozen=True)
class Header:
    """What a safetensors file says of itself, checked against its size.

    Attributes:
        tensors: name mapped to (info, begin, end), in file order; offsets count from `data_start`.
        metadata: `__metadata__`.
        data_start: offset of the first data byte in the file.
        raw: the header's bytes, its length field included.
        identity: of the file when it was read.
    """

    tensors: dict[str, tuple[TensorInfo, int, int]]
    metadata: dict[str, str]
    data_start: int
    file_size: int
    raw: bytes
    identity: Identity


def read_header(path: Path, *, root: Path | None = None) -> Header:
    """The header of a file, every claim checked.

    Raises:
        Refused: not a safetensors file (`safetensors-not`), cut short (`file-truncated`), or a header that lies or is
            ambiguous (`safetensors-header`).
    """
    fd = open_input(path, root=root)
    try:
        status = os.fstat(fd)
        size = status.st_size
        start = read_exact(fd, 0, min(size, 512), file=str(path))
        _expect_safetensors(path, start, size)
        (length,) = struct.unpack("<Q", start[:8])
        if length > MAX_HEADER_SIZE:
            raise _lies(path, f"the header claims {length} bytes; {MAX_HEADER_SIZE} is the format's limit")
        if 8 + length > size:
            raise _truncated(path, 8 + length, size)
        raw = read_exact(fd, 0, 8 + length, file=str(path))
    finally:
        os.close(fd)
    tensors, metadata = _parse(path, raw[8:])
    end = _check_extents(path, tensors)
    if 8 + length + end > size:
        raise _truncated(path, 8 + length + end, size)
    if 8 + length + end < size:
        raise _lies(path, f"{size - 8 - length - end} bytes follow the last tensor")
    return Header(tensors, metadata, 8 + length, size, raw, Identity.of(status))


def _expect_safetensors(path: Path, start: bytes, size: int) -> None:
    what = None
    if start.startswith(b"version https://git-lfs"):
        what = "a git-lfs pointer, not the weights; run: git lfs pull"
    elif start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")) and start[8:9] != b"{":
        what = "a pickled PyTorch file under a .safetensors name; it is not read as one"
    elif start[:15].lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        what = "a web page, not weights: the download went wrong"
    elif start.startswith(b"GGUF"):
        what = "a GGUF file"
    elif size == 0:
        what = "an empty file"
    elif size < 10:
        raise _truncated(path, 10, size)
    elif start[8:9] != b"{":
        what = "not a safetensors file (no header begins at byte 8)"
    if what is not None:
        raise Refused("safetensors-not", f"this is {what}", where=show(path))


def _truncated(path: Path, expected: int, size: int) -> Refused:
    return Refused(
        "file-truncated",
        "the file is cut short",
        where=show(path),
        expected=f"{expected} bytes at least",
        got=f"{size} bytes",
        next="download or copy it again",
    )


def _lies(path: Path, what: str) -> Refused:
    return Refused("safetensors-header", what, where=show(path))


def _parse(path: Path, text: bytes) -> tuple[dict[str, tuple[TensorInfo, int, int]], dict[str, str]]:
    header = parse_json(text, where=str(path))
    if not isinstance(header, dict):
        raise _lies(path, "the header is no JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _lies(path, "__metadata__ is not an object of strings")
    found = {name: _entry(path, name, value) for name, value in header.items()}
    return dict(sorted(found.items(), key=lambda item: (item[1][1], item[1][2]))), metadata


def _entry(path: Path, name: str, value: Any) -> tuple[TensorInfo, int, int]:
    if not name or len(name) > MAX_NAME_LENGTH or _UNSAFE_NAME.search(name):
        raise _lies(path, f"a tensor has an unsafe name: {show(name, 60)!r}")
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise _lies(path, f"{show(name)} does not have exactly dtype, shape and data_offsets")
    dtype = _DTYPES.get(value["dtype"]) if isinstance(value["dtype"], str) else None
    if dtype is None:
        raise _lies(path, f"{show(name)} has the unknown dtype {show(value['dtype'])}")
    shape, offsets = value["shape"], value["data_offsets"]
    if not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2:
        raise _lies(path, f"{show(name)} has a malformed shape or data_offsets")
    info = TensorInfo(dtype, tuple(shape))
    bits = info.numel * dtype.bits
    if bits % 8 or info.numel > MAX_DIMENSION or offsets[1] - offsets[0] != bits // 8:
        raise _lies(
            path, f"{show(name)} is {dtype.value} {show(shape)}, and its data_offsets hold {offsets[1] - offsets[0]} bytes"
        )
    return info, offsets[0], offsets[1]


def _are_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n <= MAX_DIMENSION for n in value)


def _check_extents(path: Path, tensors: Mapping[str, tuple[TensorInfo, int, int]]) -> int:
    """Data without gap or overlap, in order; returns where it ends."""
    position = 0
    for name, (_, begin, end) in tensors.items():
        if begin != position:
            what = "overlaps the tensor before it" if begin < position else f"leaves a gap of {begin - position} bytes"
            raise _lies(path, f"{show(name)} {what}")
        position = end
    return position


def build_header(
    tensors: Sequence[tuple[str, TensorInfo]],
    metadata: Mapping[str, str],
    *,
    align: int = 8,
    data_start_mod: tuple[int, int] | None = None,
) -> bytes:
    """A header for tensors that follow each other in the given order; its length field included.

    Args:
        align: the header's length becomes a multiple of this, padded with spaces.
        data_start_mod: `(m, n)`: pad so that the data begins at `m` modulo `n` instead; `m` a multiple of `align`.
    """
    content: dict[str, Any] = {"__metadata__": dict(sorted({**metadata, "format": "pt"}.items()))}
    offset = 0
    for name, info in tensors:
        end = offset + info.nbytes
        content[name] = {"dtype": info.dtype.value, "shape": list(info.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    if data_start_mod is not None and data_start_mod[0] % align == 0:
        padding = (data_start_mod[0] - 8 - len(text)) % data_start_mod[1]
    else:
        padding = -len(text) % align
    text += b" " * padding
    return struct.pack("<Q", len(text)) + text


@dataclass(frozen=True)
class Index:
    """What an index.json claims: which file each tensor is in."""

    weight_map: dict[str, str]
    metadata: dict[str, Any]


def read_index(path: Path, *, root: Path | None = None) -> Index:
    """The claims of an index.json; nothing is checked against the files.

    Raises:
        Refused: malformed, or a file name that is not a plain one (`index-malformed`).
    """
    value = load_json(path, root=root, limit=MAX_HEADER_SIZE)
    weight_map = value.get("weight_map") if isinstance(value, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise Refused("index-malformed", "there is no weight_map", where=show(path))
    for name, file in weight_map.items():
        if not isinstance(file, str) or not _PLAIN_FILE.fullmatch(file) or ".." in file:
            raise Refused(
                "index-malformed",
                f"{show(name)} is mapped to {show(file)!r}, which is no plain file name",
                where=show(path),
                expected="a name such as model-00001-of-00002.safetensors",
            )
    metadata = value.get("metadata")
    return Index(weight_map, metadata if isinstance(metadata, dict) else {})


def build_index(weight_map: Mapping[str, str], total_size: int) -> bytes:
    """An index.json as transformers writes it; `total_size` is in bytes."""
    content = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()
