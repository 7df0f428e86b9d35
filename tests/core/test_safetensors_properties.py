"""Headers of any content: what is written is what is read, by us and by the library; what it rejects we refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize

from converter.core.formats.safetensors_io import build_header, read_header
from converter.core.tensors.dtypes import TensorInfo
from converter.errors import Refused
from strategies import metadata, tensor_lists

HEADER = json.dumps(
    {
        "__metadata__": {"format": "pt"},
        "w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        "x": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]},
    }
).encode()
SOUND = len(HEADER).to_bytes(8, "little") + HEADER + bytes(16)

built = given(tensors=tensor_lists, extra=metadata, modulo=st.none() | st.integers(0, 511).map(lambda n: (8 * n, 4096)))


@settings(deadline=None, max_examples=50)
@built
def test_what_is_built_is_what_is_read(
    tmp_path_factory: pytest.TempPathFactory,
    tensors: list[tuple[str, TensorInfo]],
    extra: dict[str, str],
    modulo: tuple[int, int] | None,
) -> None:
    expect_read_as_built(tmp_path_factory.getbasetemp() / "built.safetensors", tensors, extra, modulo)


@pytest.mark.slow
@settings(deadline=None, max_examples=1000)
@built
def test_whatever_is_built_is_what_is_read(
    tmp_path_factory: pytest.TempPathFactory,
    tensors: list[tuple[str, TensorInfo]],
    extra: dict[str, str],
    modulo: tuple[int, int] | None,
) -> None:
    expect_read_as_built(tmp_path_factory.getbasetemp() / "built.safetensors", tensors, extra, modulo)


def expect_read_as_built(
    path: Path, tensors: list[tuple[str, TensorInfo]], extra: dict[str, str], modulo: tuple[int, int] | None
) -> None:
    head = build_header(tensors, extra, data_start_mod=modulo)
    path.write_bytes(head + bytes(sum(i.nbytes for _, i in tensors)))
    header = read_header(path)
    assert [(n, i) for n, (i, _, _) in header.tensors.items() if i.nbytes] == [(n, i) for n, i in tensors if i.nbytes]
    assert {n: i for n, (i, _, _) in header.tensors.items()} == dict(tensors)
    assert header.metadata == extra | {"format": "pt"}
    assert header.raw == head
    theirs = {n: (t["dtype"], t["shape"]) for n, t in deserialize(path.read_bytes())}
    assert theirs == {n: (i.dtype.value, list(i.shape)) for n, i in tensors}


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_what_the_library_rejects_we_refuse(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Mutations of a sound file: no other error than ours escapes, and we are never more lenient than the library."""
    expect_as_strict(tmp_path_factory.getbasetemp() / "mutated.safetensors", data)


@pytest.mark.slow
@settings(deadline=None, max_examples=3000)
@given(st.data())
def test_whatever_the_library_rejects_we_refuse(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    expect_as_strict(tmp_path_factory.getbasetemp() / "mutated.safetensors", data)


def expect_as_strict(path: Path, data: st.DataObject) -> None:
    raw = bytearray(SOUND)
    for _ in range(data.draw(st.integers(1, 3))):
        if len(raw) < 2:
            break
        position = data.draw(st.integers(0, len(raw) - 1))
        kind = data.draw(st.sampled_from(["change", "delete", "insert", "cut"]))
        if kind == "change":
            raw[position] = data.draw(st.integers(0, 255))
        elif kind == "delete":
            del raw[position]
        elif kind == "insert":
            raw.insert(position, data.draw(st.sampled_from(b'0123456789{}[],:"-.e \\\xff')))
        elif position:
            del raw[position:]
    path.write_bytes(bytes(raw))
    try:
        read_header(path)
    except Refused:
        return
    try:
        deserialize(bytes(raw))
    except SafetensorError as error:
        pytest.fail(f"accepted {bytes(raw)!r}, which the library rejects: {error}")
