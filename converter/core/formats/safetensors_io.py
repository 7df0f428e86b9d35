"""safetensors headers and index.json: a strict reader and a canonical writer, without torch and without the library.

The library's own reader accepts a name twice (the last wins), unknown keys and unsafe names; a converter that copies
bytes by header must not. Every refusal names the file.

Source of the format: https://github.com/huggingface/safetensors/blob/v0.8.0/README.md#format
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converter.core.files.opening import Identity, open_input, read_exact
from converter.core.files.strict_json import load_json, parse_json
from converter.core.tensors.dtypes import DType, TensorInfo
from converter.diagnostic import Command, Steps
from converter.errors import Refused
from converter.text import show

MAX_HEADER_SIZE = 100_000_000
"""Source: `MAX_HEADER_SIZE`, https://github.com/huggingface/safetensors/blob/v0.8.0/safetensors/src/tensor.rs"""

MAX_HEADER_VALUES = 1_600_000
"""Commas, objects and arrays in a header, which needs 8 of them for a tensor: 200,000 tensors in one file."""

MAX_NAME_LENGTH = 1024
MAX_DIMENSIONS = 64
MAX_NUMBER = 2**63 - 1
"""Sizes and offsets are signed 64-bit numbers wherever they go from here: torch, `pread`, `copy_file_range`."""

_DTYPES = {d.value: d for d in DType}
_FIELDS = {"dtype", "shape", "data_offsets"}
_PLAIN_FILE = re.compile(r"[A-Za-z0-9_][\w.+-]{0,254}\.(?:safetensors|bin)", re.ASCII)

_LFS = b"version https://git-lfs"
_LFS_SIZE = re.compile(rb"^size (\d{1,18})$", re.MULTILINE)
_SMALLEST = 8 + len("{}")


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
        Refused: not a safetensors file (`safetensors-not`), cut short or a git-lfs pointer (`file-truncated`), or a
            header that lies or is ambiguous (`safetensors-header`).
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
    end = 8 + length + _check_extents(path, tensors)
    if end > size:
        raise _truncated(path, end, size)
    if end < size:
        raise _lies(path, f"{size - end} bytes follow the last tensor", expected=f"{end} bytes", got=f"{size} bytes")
    return Header(tensors, metadata, 8 + length, size, raw, Identity.of(status))


_OTHER_FORMATS = (
    (b"PK\x03\x04", "a pickled PyTorch file (a zip) under a .safetensors name; it is not read as one"),
    (b"\x80\x02", "a pickled PyTorch file under a .safetensors name; it is not read as one"),
    (b"\x80\x03", "a pickle under a .safetensors name; it is not read as one"),
    (b"\x80\x04", "a pickle under a .safetensors name; it is not read as one"),
    (b"\x80\x05", "a pickle under a .safetensors name; it is not read as one"),
    (b"GGUF", "a GGUF file"),
    (b"\x89HDF", "an HDF5 file"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive"),
    (b"\x93NUMPY", "a numpy file"),
)


def _expect_safetensors(path: Path, start: bytes, size: int) -> None:
    """Name what else the file is, where its first bytes can't begin a safetensors file."""
    if start.startswith(_LFS):
        raise _lfs_pointer(path, start, size)
    if size == 0:
        raise Refused("safetensors-not", "this is an empty file", where=show(path), next="download or copy it again")
    if size >= _SMALLEST and start[8:9] == b"{":
        return
    what = next((words for magic, words in _OTHER_FORMATS if start.startswith(magic)), None)
    if what is None and start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        what = "a web page, not weights: the download went wrong"
    if what is None and not start.strip(b"\0"):
        what = "filled with zeros: a download or copy that never finished"
    if what is None and start.lstrip().startswith((b"{", b"[")):
        what = "a JSON file, not weights"
    if what is None and size < _SMALLEST:
        raise _truncated(path, _SMALLEST, size)
    raise Refused(
        "safetensors-not", f"this is {what or 'not a safetensors file: no header begins at byte 8'}", where=show(path)
    )


def _lfs_pointer(path: Path, start: bytes, size: int) -> Refused:
    promised = _LFS_SIZE.search(start)
    return Refused(
        "file-truncated",
        "this is a git-lfs pointer, not the weights that it stands for",
        where=show(path),
        expected=f"{promised[1].decode()} bytes" if promised else "the weights",
        got=f"{size} bytes",
        next=Steps(Command("lfs", ("pull",), program="git"), ", in the folder it was cloned to"),
        facts={"instead": "git-lfs"},
    )


def _truncated(path: Path, expected: int, size: int) -> Refused:
    return Refused(
        "file-truncated",
        "the file is cut short",
        where=show(path),
        expected=f"{expected} bytes at least",
        got=f"{size} bytes",
        next="download or copy it again",
    )


def _lies(path: Path, what: str, *, expected: str | None = None, got: str | None = None) -> Refused:
    return Refused("safetensors-header", what, where=show(path), expected=expected, got=got)


def _parse(path: Path, text: bytes) -> tuple[dict[str, tuple[TensorInfo, int, int]], dict[str, str]]:
    if not text.rstrip(b" ").endswith(b"}"):
        raise _lies(path, "the header does not end with its closing brace")
    try:
        header = parse_json(text, where=str(path), most=MAX_HEADER_VALUES)
    except Refused as error:
        raise _lies(path, f"the header can't be trusted: {error.facts['why']}") from error
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _lies(path, "__metadata__ is not an object of strings")
    if not all(map(_is_text, (*metadata, *metadata.values()))):
        raise _lies(path, "__metadata__ holds half of a surrogate pair, which is no text")
    found = {name: _entry(path, name, value) for name, value in header.items()}
    return dict(sorted(found.items(), key=lambda item: item[1][1:])), metadata


def _entry(path: Path, name: str, value: Any) -> tuple[TensorInfo, int, int]:
    """Info and data offsets of one tensor.

    Raises:
        Refused: an unsafe name, a field missing, unknown or malformed, or a size that the offsets contradict.
    """
    if not _is_safe(name):
        raise _lies(path, f"a tensor has an unsafe name: {show(name, 60)!r}")
    if not isinstance(value, dict) or value.keys() != _FIELDS:
        raise _lies(path, f"{show(name)} does not have exactly dtype, shape and data_offsets")
    dtype = _DTYPES.get(value["dtype"]) if isinstance(value["dtype"], str) else None
    if dtype is None:
        raise _lies(path, f"{show(name)} has the unknown dtype {show(value['dtype'])}")
    shape, offsets = value["shape"], value["data_offsets"]
    if not _are_counts(shape) or len(shape) > MAX_DIMENSIONS:
        raise _lies(path, f"{show(name)} has a malformed shape: {show(shape)}")
    if not _are_counts(offsets) or len(offsets) != 2:
        raise _lies(path, f"{show(name)} has malformed data_offsets: {show(offsets)}")
    begin, end = offsets
    info = TensorInfo(dtype, tuple(shape))
    bits = math.prod(shape) * dtype.bits
    # Zeros are left out: torch, too, refuses a zero-size shape whose other dimensions overflow.
    if (bits or math.prod([n for n in shape if n]) * dtype.bits) > MAX_NUMBER:
        raise _lies(path, f"{show(name)} has an impossible size: {show(shape)}")
    if bits % 8 or end - begin != bits // 8:
        raise _lies(
            path,
            f"{show(name)} is {dtype.value} {show(shape)}, which its data_offsets contradict",
            expected=f"{bits // 8} bytes" if bits % 8 == 0 else "a whole number of bytes",
            got=f"{end - begin} bytes",
        )
    return info, begin, end


def _is_safe(name: str) -> bool:
    """False for names that would harm a terminal, a log or a program that makes a path of them."""
    if not name or len(name) > MAX_NAME_LENGTH or not name.isprintable() or name[0] == "/":
        return False
    return ".." not in name or ".." not in name.split("/")


def _is_text(value: str) -> bool:
    """False for what UTF-8 can't hold: JSON spells it as an escape, and the library refuses it."""
    return value.isascii() or not any("\ud800" <= c <= "\udfff" for c in value)


def _are_counts(value: Any) -> bool:
    if type(value) is not list:
        return False
    # bool is an int in Python, and 1.0 equals 1; neither is a count.
    return all([type(n) is int and 0 <= n <= MAX_NUMBER for n in value])  # noqa: C419 - twice as fast as a generator


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

    Raises:
        Refused: longer than readers accept (`header-too-large`).
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
    if len(text) > MAX_HEADER_SIZE:
        what = f"a header of {len(text)} bytes is more than any reader accepts ({MAX_HEADER_SIZE})"
        raise Refused("header-too-large", what, next="write more files, with --max-shard-size")
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
    try:
        value = load_json(path, root=root, limit=MAX_HEADER_SIZE)
    except Refused as error:
        if error.code == "json-malformed":
            raise Refused("index-malformed", error.what, where=show(path)) from error
        raise
    weight_map = value.get("weight_map") if isinstance(value, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise Refused("index-malformed", "there is no weight_map", where=show(path))
    for name, file in weight_map.items():
        plain = isinstance(file, str) and _PLAIN_FILE.fullmatch(file) and ".." not in file
        if not plain or file.endswith(".bin") != path.name.endswith(".bin.index.json"):
            raise Refused(
                "index-malformed",
                f"{show(name)} is mapped to {show(file)!r}, which is not a plain file name",
                where=show(path),
                expected="a name such as model-00001-of-00002" + (".bin" if ".bin." in path.name else ".safetensors"),
            )
    metadata = value.get("metadata")
    return Index(weight_map, metadata if isinstance(metadata, dict) else {})


def build_index(weight_map: Mapping[str, str], total_size: int) -> bytes:
    """An index.json as transformers writes it; `total_size` is in bytes."""
    content = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()
