"""Torch's zip format, byte by byte against torch's own writer."""

from __future__ import annotations

import os
import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from converter.core.formats import torch_zip_writer as torch_zip
from converter.core.tensors.dtypes import DType, TensorInfo
from converter.errors import Refused
from small_models import Tensors, numbers

ID_BYTES = 40
"""The serialization id: torch's depends on the order of a hash set."""

TYPES = {
    getattr(torch, d.torch_name): d for d in DType if d.value not in ("F4", "F6_E2M3", "F6_E3M2")
}  # fmt: skip
SHAPES = ((), (0,), (3,), (2, 0, 3), (5, 7), (2, 3, 4), (2, 1, 3, 4), (300, 30))


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """Random bits; of booleans, one in each byte."""
    count = torch.Size(shape).numel()
    most = 2 if dtype is torch.bool else 256
    bits = torch.randint(0, most, (count * dtype.itemsize,), dtype=torch.uint8, generator=torch.Generator())
    return bits.view(dtype).reshape(shape) if count else torch.empty(shape, dtype=dtype)


def built(file: str, given: Tensors) -> bytes:
    """What `torch_zip` makes of tensors, put together in memory."""
    archive = torch_zip.archive(file, [(n, TensorInfo(TYPES[t.dtype], tuple(t.shape))) for n, t in given.items()])
    out = bytearray(archive.size)
    sums = []
    for record, tensor in zip(archive.tensors, given.values(), strict=True):
        raw = tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        out[record.offset : record.offset + record.size] = raw
        sums.append(zlib.crc32(raw))
    out[: len(archive.head)] = archive.head
    for offset, data in torch_zip.closing(archive, sums):
        out[offset : offset + len(data)] = data
    return bytes(out)


def without_id(path: Path) -> bytes:
    """A torch file, its serialization id and that record's checksums zeroed."""
    raw = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        info = next(i for i in archive.infolist() if i.filename.endswith("/.data/serialization_id"))
        identity = archive.read(info)
    for found in (identity, info.CRC.to_bytes(4, "little")):
        raw = raw.replace(found, bytes(len(found)))
    assert len(identity) == ID_BYTES
    return bytes(raw)


@pytest.mark.parametrize(
    "given",
    [
        {f"{str(t)[6:]}.{i}": random_tensor(t, s) for t in TYPES for i, s in enumerate(SHAPES)},
        {"w": torch.ones(3)},
        {f"näme{i:05d}": torch.full((2,), float(i)) for i in range(2001)},
        {"wide": torch.zeros(70_000, 2), "long": torch.zeros(300)},
    ],
    ids=["types-and-shapes", "one", "many", "large-numbers"],
)
def test_the_bytes_are_those_of_torch_save_but_for_the_serialization_id(tmp_path: Path, given: Tensors) -> None:
    ours, theirs = tmp_path / "ours.bin", tmp_path / "theirs" / "weights.bin"
    theirs.parent.mkdir()
    torch.save(OrderedDict(given), theirs)
    ours.write_bytes(built("weights.bin", given))
    assert len(ours.read_bytes()) == len(theirs.read_bytes())
    assert without_id(ours) == without_id(theirs)


@pytest.mark.parametrize("dtype", [DType.F4, DType.F6_E2M3, DType.F6_E3M2])
def test_a_type_that_torch_has_not_is_refused(dtype: DType) -> None:
    with pytest.raises(Refused, match=r"can't hold w: torch has no F") as caught:
        torch_zip.archive("pytorch_model.bin", [("w", TensorInfo(dtype, (8, 8)))])
    assert caught.value.code == "torch-dtype"


def test_sizes_and_offsets_past_4_gib_are_read_back_by_zipfile_and_by_torch(tmp_path: Path) -> None:
    """The large tensor is a hole in a sparse file. The same layout was compared with torch.save's, byte by byte."""
    count = 2**32 + 10
    given = [("big", TensorInfo(DType.U8, (count,))), ("after", TensorInfo(DType.F32, (5,)))]
    archive = torch_zip.archive("pytorch_model.bin", given)
    raw = numbers(5).numpy().tobytes()
    file = tmp_path / "pytorch_model.bin"
    with file.open("wb") as out:
        out.truncate(archive.size)
        os.pwrite(out.fileno(), archive.head, 0)
        os.pwrite(out.fileno(), raw, archive.tensors[1].offset)
        for offset, data in torch_zip.closing(archive, [0x12345678, zlib.crc32(raw)]):
            os.pwrite(out.fileno(), data, offset)
    with zipfile.ZipFile(file) as opened:
        sizes = {i.filename: (i.file_size, i.CRC) for i in opened.infolist()}
        assert sizes["pytorch_model/data/0"] == (count, 0x12345678)
        assert opened.read("pytorch_model/data/1") == raw
    found = torch.load(file, mmap=True, weights_only=True)  # noqa: TID251 - the oracle
    assert found["big"].shape == (count,)
    assert torch.equal(found["after"], numbers(5))
    assert found["big"][-3:].tolist() == [0, 0, 0]
