"""Files of ranks that say the same in the same bytes: each has its own numbers, and what is kept of them is bounded."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import pytest
import torch

from converter.core.files.reading import InputFiles
from converter.core.formats.torch_container import _Shared
from converter.core.formats.torch_file import read_torch_file
from converter.core.formats.zip_directory import plain_directory
from converter.core.tensors.nodes import Stored


def values_of(path: Path) -> dict[str, bytes]:
    """The bytes of each tensor of a saved dictionary."""
    read = read_torch_file(path)
    found = {}
    with InputFiles({str(path.absolute()): read.identity}) as files:
        for name, tensor in read.value.items():
            assert isinstance(tensor, Stored)
            buffer = bytearray(tensor.info.nbytes)
            files.read_into(tensor.file, tensor.offset, buffer)
            found[name] = bytes(buffer)
    return found


def test_files_with_one_pickle_have_each_its_own_numbers(tmp_path: Path) -> None:
    given = {rank: {f"w{i}": torch.full((3, 5), rank + i / 8) for i in range(4)} for rank in range(3)}
    raws = set()
    for rank, tensors in given.items():
        path = tmp_path / f"rank_{rank}.pt"
        torch.save(tensors, path)
        with zipfile.ZipFile(path) as archive:
            raws.add(next(archive.read(n) for n in archive.namelist() if n.endswith("/data.pkl")))
    assert len(raws) == 1
    for rank, tensors in given.items():
        expected = {n: t.numpy().tobytes() for n, t in tensors.items()}
        assert values_of(tmp_path / f"rank_{rank}.pt") == expected


def test_what_is_read_of_one_file_can_be_changed_without_the_next_one_noticing(tmp_path: Path) -> None:
    for name in "ab":
        torch.save({"list": [1, {"two": 2}], "w": torch.zeros(2)}, tmp_path / f"{name}.pt")
    first = read_torch_file(tmp_path / "a.pt").value
    first["list"][1]["two"] = 3
    first["list"].append(4)
    assert read_torch_file(tmp_path / "b.pt").value["list"] == [1, {"two": 2}]


@pytest.mark.parametrize(("most", "most_bytes"), [(2, 1000), (100, 30)])
def test_no_more_is_kept_than_there_is_room_for(most: int, most_bytes: int) -> None:
    shared = _Shared(most, most_bytes)
    raws = [b"\x80\x02]K" + bytes([n]) + b"a." for n in range(50)]
    for raw in [*raws, *raws]:
        assert shared.read(raw, "here").value == [raw[4]]
        assert len(shared._known) <= most
        assert sum(map(len, shared._known)) == shared._bytes <= most_bytes


@pytest.mark.parametrize("count", [3, 70, 700])
def test_the_directory_is_read_as_zipfile_reads_it(tmp_path: Path, count: int) -> None:
    path = tmp_path / "many.pt"
    torch.save([torch.full((1,), float(i)) for i in range(count)], path)
    fd = os.open(path, os.O_RDONLY)
    try:
        found = plain_directory(lambda at, length: os.pread(fd, length, at), 0, path.stat().st_size)
    finally:
        os.close(fd)
    with zipfile.ZipFile(path) as archive:
        expected = archive.infolist()
    assert found is not None
    facts = ("filename", "CRC", "file_size", "compress_size", "header_offset", "compress_type", "flag_bits")
    assert [[getattr(i, f) for f in facts] for i in found] == [[getattr(i, f) for f in facts] for i in expected]
