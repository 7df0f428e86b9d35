"""safetensors headers: strict reading, canonical writing, agreement with the safetensors library."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import deserialize, safe_open
from safetensors.torch import save, save_file

from converter.core.files.opening import identity
from converter.core.formats.safetensors_io import MAX_HEADER_SIZE, build_header, read_header
from converter.core.tensors.dtypes import DType, TensorInfo
from converter.errors import Refused
from strategies import PACKED

F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def file_of(header: Any, data: bytes = b"") -> bytes:
    """A file with this header, given as JSON text or as a value, and this data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(**changes: Any) -> bytes:
    """A file of one tensor of eight bytes, sound but for the changes."""
    return file_of({"w": {k: v for k, v in (F32 | changes).items() if v is not ...}}, bytes(8))


def named(name: str) -> bytes:
    return file_of({name: F32}, bytes(8))


def pair(first: tuple[int, int], second: tuple[int, int], size: int) -> bytes:
    u8 = [{"dtype": "U8", "shape": [b - a], "data_offsets": [a, b]} for a, b in (first, second)]
    return file_of({"a": u8[0], "b": u8[1]}, bytes(size))


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d" * 32 + b"\nsize 4976698672\n"

# Name: (the file's bytes, the error's code, words that the message has).
MALFORMED: dict[str, tuple[bytes, str, str]] = {
    # What is not a safetensors file at all
    "empty": (b"", "safetensors-not", "empty file"),
    "zeros": (bytes(4096), "safetensors-not", "zeros"),
    "git-lfs-pointer": (LFS, "file-truncated", "git-lfs pointer"),
    "git-lfs-pointer-size": (LFS, "file-truncated", "expected 4976698672 bytes"),
    "pickle-zip": (b"PK\x03\x04" + bytes(60), "safetensors-not", "pickled PyTorch file"),
    "pickle-2": (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "safetensors-not", "pickled PyTorch file"),
    "pickle-4": (b"\x80\x04\x95\x14\x00\x00\x00\x00\x00\x00\x00\x8c\x02os", "safetensors-not", "a pickle"),
    "web-page": (b"<!DOCTYPE html>\n<html><head><title>Log in</title>", "safetensors-not", "a web page"),
    "web-page-lower": (b"\n  <html>\n<body>404</body></html>", "safetensors-not", "a web page"),
    "gguf": (b"GGUF\x03\x00\x00\x00" + bytes(40), "safetensors-not", "GGUF"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(40), "safetensors-not", "HDF5"),
    "gzip": (b"\x1f\x8b\x08" + bytes(40), "safetensors-not", "gzip"),
    "numpy": (b"\x93NUMPY\x01\x00v\x00" + bytes(40), "safetensors-not", "numpy"),
    "json": (b'{"error": "Invalid credentials in Authorization header"}', "safetensors-not", "JSON"),
    "text": (b"Entry not found, sorry for that", "safetensors-not", "no header begins"),
    # Cut short
    "one-byte": (b"\x10", "file-truncated", "got 1 bytes"),
    "length-field-only": (file_of(b"{}")[:8], "file-truncated", "got 8 bytes"),
    "cut-in-header": (entry()[:30], "file-truncated", "got 30 bytes"),
    "cut-in-data": (entry()[:-1], "file-truncated", "cut short"),
    "no-data": (entry()[:-8], "file-truncated", "cut short"),
    # Length of the header
    "header-longer-than-limit": (
        struct.pack("<Q", MAX_HEADER_SIZE + 1) + b"{" + bytes(99), "safetensors-header", "is the format's limit"
    ),
    "header-length-huge": (b"\xff" * 8 + b"{" + bytes(99), "safetensors-header", "18446744073709551615"),
    "header-length-past-end": (struct.pack("<Q", 5000) + b"{}", "file-truncated", "5008 bytes"),
    "header-length-too-short": (struct.pack("<Q", 20) + entry()[8:], "safetensors-header", "closing brace"),
    "trailing-bytes": (entry() + b"x", "safetensors-header", "1 bytes follow the last tensor"),
    "trailing-bytes-after-nothing": (file_of({}, b"xyz"), "safetensors-header", "3 bytes follow"),
    # JSON
    "header-is-a-list": (file_of([1]), "safetensors-not", "no header begins"),
    "leading-space": (file_of(b' {"w": ' + json.dumps(F32).encode() + b"}", bytes(8)), "safetensors-not", "no header"),
    "trailing-newline": (file_of(b"{}\n"), "safetensors-header", "closing brace"),
    "trailing-nul": (file_of(b"{}\0\0"), "safetensors-header", "closing brace"),
    "two-objects": (file_of(b"{}{}"), "safetensors-header", "Extra data"),
    "not-json": (file_of(b"{w}"), "safetensors-header", "property name"),
    "not-utf-8": (file_of(b'{"\xff": 1}'), "safetensors-header", "not UTF-8"),
    "deep": (file_of(b'{"w":' + b"[" * 100 + b"]" * 100 + b"}"), "safetensors-header", "deeper"),
    "deep-bomb": (file_of(b'{"w":' + b"[" * 100_000 + b"}"), "safetensors-header", "header"),
    "nan": (file_of(b'{"w": NaN}'), "safetensors-header", "NaN"),
    # Keys twice
    "name-twice": (
        file_of(b'{"w":%s,"w":%s}' % ((json.dumps(F32).encode(),) * 2), bytes(8)),
        "safetensors-header",
        "`w` appears twice",
    ),
    "name-twice-escaped": (
        file_of(rb'{"w":%s,"\u0077":%s}' % ((json.dumps(F32).encode(),) * 2), bytes(8)), "safetensors-header", "twice"
    ),
    "field-twice": (
        file_of(b'{"w":{"dtype":"F32","dtype":"I32","shape":[2],"data_offsets":[0,8]}}', bytes(8)),
        "safetensors-header",
        "`dtype` appears twice",
    ),
    "metadata-twice": (
        file_of(b'{"__metadata__":{"a":"1"},"__metadata__":{}}'), "safetensors-header", "`__metadata__` appears twice"
    ),
    "metadata-key-twice": (file_of(b'{"__metadata__":{"a":"1","a":"2"}}'), "safetensors-header", "`a` appears twice"),
    # Metadata
    "metadata-not-strings": (file_of({"__metadata__": {"epoch": 3}}), "safetensors-header", "object of strings"),
    "metadata-nested": (file_of({"__metadata__": {"a": {"b": "c"}}}), "safetensors-header", "object of strings"),
    "metadata-list": (file_of({"__metadata__": ["pt"]}), "safetensors-header", "object of strings"),
    "metadata-lone-surrogate": (file_of({"__metadata__": {"a": "\ud800"}}), "safetensors-header", "surrogate"),
    "metadata-key-lone-surrogate": (file_of({"__metadata__": {"\udfff": "a"}}), "safetensors-header", "surrogate"),
    # Fields
    "entry-is-a-list": (file_of({"w": [1]}), "safetensors-header", "exactly dtype, shape"),
    "entry-is-null": (file_of({"w": None}), "safetensors-header", "exactly dtype, shape"),
    "dtype-missing": (entry(dtype=...), "safetensors-header", "exactly dtype, shape"),
    "shape-missing": (entry(shape=...), "safetensors-header", "exactly dtype, shape"),
    "offsets-missing": (entry(data_offsets=...), "safetensors-header", "exactly dtype, shape"),
    "unknown-field": (entry(strides=[1]), "safetensors-header", "exactly dtype, shape"),
    "dtype-unknown": (entry(dtype="F128"), "safetensors-header", "unknown dtype F128"),
    "dtype-lower-case": (entry(dtype="f32"), "safetensors-header", "unknown dtype f32"),
    "dtype-number": (entry(dtype=3), "safetensors-header", "unknown dtype"),
    "dtype-list": (entry(dtype=["F32"]), "safetensors-header", "unknown dtype"),
    # Shapes
    "shape-negative": (entry(shape=[-2]), "safetensors-header", "malformed shape"),
    "shape-two-negatives": (entry(shape=[-1, -2]), "safetensors-header", "malformed shape"),
    "shape-fraction": (entry(shape=[2.0]), "safetensors-header", "malformed shape"),
    "shape-bool": (entry(shape=[True, 2]), "safetensors-header", "malformed shape"),
    "shape-string": (entry(shape=["2"]), "safetensors-header", "malformed shape"),
    "shape-null": (entry(shape=None), "safetensors-header", "malformed shape"),
    "shape-number": (entry(shape=2), "safetensors-header", "malformed shape"),
    "shape-nested": (entry(shape=[[2]]), "safetensors-header", "malformed shape"),
    "shape-too-large": (entry(shape=[2**64]), "safetensors-header", "malformed shape"),
    "shape-too-many": (entry(shape=[1] * 64 + [2]), "safetensors-header", "malformed shape"),
    "shape-overflow": (entry(shape=[2**32, 2**32]), "safetensors-header", "impossible size"),
    "shape-wraps-to-its-size": (entry(shape=[2**62, 4, 2]), "safetensors-header", "impossible size"),
    "shape-overflow-behind-zero": (
        entry(shape=[0, 2**62, 2**62], data_offsets=[0, 0]), "safetensors-header", "impossible size"
    ),
    "shape-lies": (entry(shape=[3]), "safetensors-header", "expected 12 bytes"),
    "dtype-lies": (entry(dtype="F16"), "safetensors-header", "expected 4 bytes"),
    "half-a-byte": (entry(dtype="F4", shape=[3], data_offsets=[0, 2]), "safetensors-header", "whole number of bytes"),
    # Offsets
    "offsets-reversed": (entry(data_offsets=[8, 0]), "safetensors-header", "contradict"),
    "offsets-negative": (entry(data_offsets=[-8, 0]), "safetensors-header", "malformed data_offsets"),
    "offsets-fraction": (entry(data_offsets=[0.0, 8.0]), "safetensors-header", "malformed data_offsets"),
    "offsets-bool": (entry(dtype="U8", shape=[1], data_offsets=[False, True]), "safetensors-header", "malformed data"),
    "offsets-three": (entry(data_offsets=[0, 4, 8]), "safetensors-header", "malformed data_offsets"),
    "offsets-one": (entry(data_offsets=[8]), "safetensors-header", "malformed data_offsets"),
    "offsets-huge": (entry(data_offsets=[2**64, 2**64 + 8]), "safetensors-header", "malformed data_offsets"),
    "offsets-past-end": (entry(data_offsets=[0, 8], shape=[2])[:-4], "file-truncated", "cut short"),
    "gap-at-start": (entry(data_offsets=[8, 16]) + bytes(8), "safetensors-header", "gap of 8 bytes"),
    "gap-between": (pair((0, 4), (6, 10), 10), "safetensors-header", "b leaves a gap of 2 bytes"),
    "overlap": (pair((0, 4), (2, 6), 6), "safetensors-header", "b overlaps"),
    "same-bytes-twice": (pair((0, 4), (0, 4), 4), "safetensors-header", "b overlaps"),
    "empty-tensor-inside-another": (pair((0, 4), (2, 2), 4), "safetensors-header", "b overlaps"),
    # Names
    "name-empty": (named(""), "safetensors-header", "unsafe name"),
    "name-long": (named("w" * 1025), "safetensors-header", "unsafe name"),
    "name-escape-sequence": (named("\x1b[31mw"), "safetensors-header", "unsafe name"),
    "name-newline": (named("a\nb"), "safetensors-header", "unsafe name"),
    "name-nul": (named("a\0b"), "safetensors-header", "unsafe name"),
    "name-delete": (named("a\x7f"), "safetensors-header", "unsafe name"),
    "name-c1-control": (named("a\x9b31m"), "safetensors-header", "unsafe name"),
    "name-right-to-left": (named("a\u202eb"), "safetensors-header", "unsafe name"),
    "name-line-separator": (named("a\u2028b"), "safetensors-header", "unsafe name"),
    "name-lone-surrogate": (named("\ud800"), "safetensors-header", "unsafe name"),
    "name-climbs": (named("../../etc/passwd"), "safetensors-header", "unsafe name"),
    "name-absolute": (named("/etc/passwd"), "safetensors-header", "unsafe name"),
}  # fmt: skip


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_file_is_refused_with_its_name(name: str, tmp_path: Path) -> None:
    raw, code, words = MALFORMED[name]
    path = tmp_path / "model-00003-of-00030.safetensors"
    path.write_bytes(raw)
    with pytest.raises(Refused) as caught:
        read_header(path)
    message = str(caught.value)
    assert caught.value.code == code
    assert path.name in message
    assert words in message
    assert message.isascii() or message.replace("\n", "").isprintable()


def test_the_library_accepts_what_we_found_to_be_ambiguous(tmp_path: Path) -> None:
    """The reason for a parser of our own; should the library become strict, this says so."""
    assert dict(deserialize(MALFORMED["name-twice"][0]))["w"]["shape"] == [2]
    deserialize(MALFORMED["name-escape-sequence"][0])
    deserialize(MALFORMED["unknown-field"][0])


ACCEPTED = {
    "no-tensors": file_of({}),
    "metadata-only": file_of({"__metadata__": {"format": "pt"}}),
    "no-metadata": entry(),
    "unaligned-header": file_of(json.dumps({"w": F32}).encode() + b" " * 3, bytes(8)),
    "padded-header": file_of(json.dumps({"w": F32}).encode() + b" " * 5000, bytes(8)),
    "zero-size": entry(shape=[0, 4096], data_offsets=[0, 0])[:-8],
    "zero-size-beside-others": pair((0, 0), (0, 4), 4),
    "header-order-is-not-file-order": pair((4, 8), (0, 4), 8),
    "long-name": named("w" * 1024),
    "unicode-name": named("größe.层.weight"),
    "name-of-another-framework": named("decoder/layers_0/mlp/wi:0"),
    "name-with-dots": named("a..b"),
    "name-with-spaces": named("my weight"),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_odd_but_sound_file_is_read_as_the_library_reads_it(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(ACCEPTED[name])
    header = read_header(path)
    data = path.read_bytes()[header.data_start :]
    ours = {n: (i.dtype.value, list(i.shape), data[a:b]) for n, (i, a, b) in header.tensors.items()}
    assert ours == {n: (t["dtype"], t["shape"], bytes(t["data"])) for n, t in deserialize(ACCEPTED[name])}


def test_tensors_are_listed_in_file_order(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(ACCEPTED["header-order-is-not-file-order"])
    assert [(n, a, b) for n, (_, a, b) in read_header(path).tensors.items()] == [("b", 0, 4), ("a", 4, 8)]


def test_header_says_where_data_begins_and_what_was_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(entry())
    header = read_header(path)
    assert header.raw == entry()[:-8]
    assert header.data_start == len(entry()) - 8
    assert header.file_size == len(entry())
    assert header.identity == identity(path)


# Agreement with the library on files that it wrote

TORCH = [d for d in DType if hasattr(torch, d.torch_name)]


def test_every_dtype_that_torch_and_the_library_share_is_tested() -> None:
    assert {d.value for d in DType} - {d.value for d in TORCH} == {d.value for d in PACKED}


def values(dtype: DType, shape: tuple[int, ...]) -> torch.Tensor:
    """Bytes that count up, seen as this dtype; of BOOL only 0 and 1 are values."""
    raw = torch.arange(TensorInfo(dtype, shape).nbytes, dtype=torch.int64).to(torch.uint8)
    if dtype is DType.BOOL:
        raw = raw % 2
    return raw.view(getattr(torch, dtype.torch_name)).reshape(shape)


@pytest.mark.parametrize("dtype", TORCH, ids=lambda d: d.value)
def test_a_file_of_the_library_is_read_as_it_was_written(dtype: DType, tmp_path: Path) -> None:
    tensors = {
        "matrix": values(dtype, (3, 5)),
        "scalar": values(dtype, ()),
        "empty": values(dtype, (0,)),
        "empty.wide": values(dtype, (4, 0, 7)),
        "deep": values(dtype, (1, 2, 1, 3)),
    }
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt", "note": "größe"})
    header = read_header(tmp_path / "model.safetensors")
    data = (tmp_path / "model.safetensors").read_bytes()[header.data_start :]
    assert header.metadata == {"format": "pt", "note": "größe"}
    assert set(header.tensors) == set(tensors)
    for name, (info, begin, end) in header.tensors.items():
        assert info == TensorInfo(dtype, tuple(tensors[name].shape))
        assert data[begin:end] == bytes(tensors[name].reshape(-1).view(torch.uint8).tolist())


@pytest.mark.parametrize("dtype", TORCH, ids=lambda d: d.value)
def test_the_library_reads_what_we_write(dtype: DType, tmp_path: Path) -> None:
    tensors = {
        "b": values(dtype, (3, 5)),
        "a": values(dtype, ()),
        "zero": values(dtype, (0, 3)),
        "c": values(dtype, (8,)),
    }
    head = build_header([(n, TensorInfo(dtype, tuple(t.shape))) for n, t in tensors.items()], {"note": "x"})
    body = b"".join(bytes(t.reshape(-1).view(torch.uint8).tolist()) for t in tensors.values())
    (tmp_path / "model.safetensors").write_bytes(head + body)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "note": "x"}
        assert set(file.keys()) == set(tensors)
        for name, tensor in tensors.items():
            found = file.get_tensor(name)
            assert found.dtype == tensor.dtype
            assert found.shape == tensor.shape
            assert torch.equal(found.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def test_header_has_the_bytes_that_the_library_writes() -> None:
    """The library sorts by size of the type, then by name; given that order, ours is the same header."""
    raw = save(
        {"b": values(DType.F32, (2, 3)), "a": values(DType.BF16, (4,)), "größe": values(DType.F32, (1,))},
        {"format": "pt"},
    )
    order = [("b", (2, 3), DType.F32), ("größe", (1,), DType.F32), ("a", (4,), DType.BF16)]
    ours = build_header([(n, TensorInfo(d, shape)) for n, shape, d in order], {})
    assert raw.startswith(ours)


def test_header_is_the_one_we_promise() -> None:
    tensors = [("z", TensorInfo(DType.BF16, (2, 1))), ("a", TensorInfo(DType.F32, ()))]
    assert build_header(tensors, {"b": "2", "a": "1"}) == (
        struct.pack("<Q", 160)
        + b'{"__metadata__":{"a":"1","b":"2","format":"pt"},"z":{"dtype":"BF16","shape":[2,1],"data_offsets":[0,4]},'
        b'"a":{"dtype":"F32","shape":[],"data_offsets":[4,8]}}' + b" " * 4
    )


def test_format_is_pt_whatever_the_source_said() -> None:
    assert b'"format":"pt"' in build_header([], {"format": "mlx"})


def test_header_has_the_same_bytes_in_whatever_order_metadata_came() -> None:
    assert build_header([], {"a": "1", "b": "2"}) == build_header([], {"b": "2", "a": "1"})


@pytest.mark.parametrize(("modulo", "of"), [(0, 4096), (8, 4096), (4088, 4096), (136, 4096), (0, 64)])
def test_data_begins_where_it_is_asked_to(modulo: int, of: int) -> None:
    head = build_header([("w", TensorInfo(DType.F32, (2,)))], {}, data_start_mod=(modulo, of))
    assert len(head) % of == modulo
    assert struct.unpack("<Q", head[:8])[0] == len(head) - 8


def test_header_is_aligned_to_what_is_asked() -> None:
    for align in (8, 64, 512):
        assert len(build_header([("w" * 9, TensorInfo(DType.F32, (2,)))], {}, align=align)[8:]) % align == 0


def test_a_header_that_no_reader_accepts_is_not_written() -> None:
    with pytest.raises(Refused, match="max-shard-size") as caught:
        build_header([], {"note": "x" * MAX_HEADER_SIZE})
    assert caught.value.code == "header-too-large"


# Size
