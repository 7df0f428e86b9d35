"""Torch's zip format, written: the pickle, the records and the directory around tensors that are written in place.

The bytes are those that torch.save (2.7 and later) writes, but for the serialization id, which torch derives from the
order of a C++ hash set. A zip says each record's CRC-32 after its data
and in its directory: `archive` knows every place before any byte is written, `closing` fills in the checksums.

Sources: https://github.com/pytorch/pytorch/blob/v2.9.0/torch/serialization.py (`_save`),
https://github.com/pytorch/pytorch/blob/v2.9.0/caffe2/serialize/inline_container.cc (records, alignment, ids).
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from converter.core.files.checksums import crc32
from converter.core.formats.torch_tree import by_name
from converter.core.tensors.dtypes import TensorInfo

ALIGNMENT = 64
"""Storages begin at multiples of this, and so does every other record."""

_LARGE = 0xFFFFFFFF
"""Sizes and offsets from here on are written in zip64 fields."""

_HAS_DESCRIPTOR, _UTF8 = 0x0008, 0x0800
_ID_DIGITS = 40
MEMBER = "archive.pt"
"""What torch.save takes a file for that has no name, because it is a stretch of another."""


@dataclass(frozen=True)
class Record:
    """A file in the archive: its local header at `start`, padded so that the data begins at `offset`.

    Attributes:
        content: None: a tensor's bytes, written by others.
    """

    name: bytes
    start: int
    offset: int
    size: int
    content: bytes | None

    @property
    def is_large(self) -> bool:
        """True where a field of its headers overflows 32 bits."""
        return self.size >= _LARGE or self.start >= _LARGE

    @property
    def stop(self) -> int:
        """Where the next record begins: after the data and what is said of it."""
        return self.offset + self.size + (0 if not self.size else 24 if self.is_large else 16)

    @property
    def flags(self) -> int:
        """Names are UTF-8; the checksum follows the data, where there is any."""
        return _UTF8 | (_HAS_DESCRIPTOR if self.size else 0)


@dataclass(frozen=True)
class Archive:
    """A torch file as it will be: every record at its place.

    Attributes:
        records: pickle and marks, then one a tensor, then version and id.
        tensors: those of the tensors, in order.
        directory: where the central directory begins.
        size: of the whole file.
    """

    records: tuple[Record, ...]
    tensors: tuple[Record, ...]
    directory: int
    size: int

    @property
    def head(self) -> bytes:
        """Everything up to the first tensor's bytes: known before any of them."""
        first = self.records.index(self.tensors[0])
        known = b"".join(_local_header(r) + (r.content or b"") + _after(r, _crc(r)) for r in self.records[:first])
        return known + _local_header(self.tensors[0])


def archive(file: str, tensors: Sequence[tuple[str, TensorInfo]], pickled: bytes | None = None) -> Archive:
    """The layout of `file` with these tensors, at least one; each gets a storage of its own.

    Args:
        pickled: what the file says of them; None: they are a dictionary by name.

    Raises:
        Refused: a type that torch doesn't have, or packs differently (`torch-dtype`).
    """
    pickled = by_name(tensors) if pickled is None else pickled
    stem = file.rpartition("/")[2].rpartition(".")[0].encode()
    contents: list[tuple[str, bytes | None, int]] = [
        (name, content, len(content))
        for name, content in (
            ("data.pkl", pickled),
            (".format_version", b"1"),
            (".storage_alignment", str(ALIGNMENT).encode()),
            ("byteorder", b"little"),
        )
    ]
    contents += [(f"data/{i}", None, info.nbytes) for i, (_, info) in enumerate(tensors)]
    contents += [("version", b"3\n", 2), (".data/serialization_id", None, _ID_DIGITS)]
    records: list[Record] = []
    position = 0
    for short, content, size in contents:
        records.append(_place(stem + b"/" + short.encode(), position, size, content))
        position = records[-1].stop
    directory = sum(46 + len(r.name) + len(_zip64(r)) for r in records)
    return Archive(tuple(records), tuple(records[4:-2]), position, position + directory + 56 + 20 + 22)


def tensorless(pickled: bytes) -> bytes:
    """A whole file of torch.save that says something and holds no tensor."""
    file = archive(MEMBER, [], pickled)
    known = b"".join(_local_header(r) + (r.content or b"") + _after(r, _crc(r)) for r in file.records[:-2])
    return known + _last_records(file, [])


def _place(name: bytes, start: int, size: int, content: bytes | None) -> Record:
    """Data begins at the next multiple of 64 that leaves four bytes for the field that the padding is hidden in."""
    record = Record(name, start, 0, size, content)
    least = start + 30 + len(name) + len(_zip64(record)) + 4
    return Record(name, start, least + -least % ALIGNMENT, size, content)


def closing(file: Archive, checksums: Sequence[int]) -> Iterator[tuple[int, bytes]]:
    """What is not tensor data after the head, at its offsets, given the CRC-32 of each tensor's bytes in order."""
    found = dict(zip(file.tensors, checksums, strict=True))
    for record, following in pairwise(file.tensors):
        yield record.offset + record.size, _after(record, found[record]) + _local_header(following)
    last = file.tensors[-1]
    yield last.offset + last.size, _after(last, found[last]) + _last_records(file, checksums)


def _last_records(file: Archive, checksums: Sequence[int]) -> bytes:
    """What follows the last tensor, or the marks where there is none: version, id and directory."""
    found = dict(zip(file.tensors, checksums, strict=True))
    version, identity = file.records[-2:]
    named = int.from_bytes(hashlib.sha256(file.records[0].content or b"").digest()[:8], "big")
    summed = crc32(struct.pack(f"<{len(checksums)}I", *checksums))
    known = {version: version.content or b"", identity: b"%020d%020d" % (named, summed)}
    parts = []
    for record, content in known.items():
        found[record] = crc32(content)
        parts += [_local_header(record), content, _after(record, found[record])]
    parts += [_entry(r, found.get(r, _crc(r))) for r in file.records]
    return b"".join(parts) + _end(file)


def _crc(record: Record) -> int:
    return crc32(record.content or b"")


def _zip64(record: Record, *, sizes_follow: bool = False) -> bytes:
    """The extra field with what overflows: both sizes (zero where they follow the data), the header's offset."""
    if not record.is_large:
        return b""
    size = 0 if sizes_follow else record.size
    sizes = struct.pack("<QQ", size, size) if record.size >= _LARGE else b""
    place = struct.pack("<Q", record.start) if record.start >= _LARGE else b""
    return struct.pack("<HH", 1, len(sizes) + len(place)) + sizes + place


def _local_header(record: Record) -> bytes:
    """Name, zip64 field and padding; checksum and sizes come after the data."""
    large = _zip64(record, sizes_follow=True)
    padding = record.offset - record.start - 30 - len(record.name) - len(large) - 4
    extra = large + b"FB" + struct.pack("<H", padding) + b"Z" * padding
    fixed = struct.pack("<4s5H3I2H", b"PK\3\4", 0, record.flags, 0, 0, 0, 0, 0, 0, len(record.name), len(extra))
    return fixed + record.name + extra


def _after(record: Record, checksum: int) -> bytes:
    """The data descriptor; an empty record has none."""
    if not record.size:
        return b""
    sizes = struct.pack("<QQ" if record.is_large else "<II", record.size, record.size)
    return struct.pack("<4sI", b"PK\7\10", checksum) + sizes


def _entry(record: Record, checksum: int) -> bytes:
    """A line of the central directory."""
    large, size = _zip64(record), min(record.size, _LARGE)
    fixed = struct.pack("<4s6H3I", b"PK\1\2", 0, 0, record.flags, 0, 0, 0, checksum, size, size)
    rest = struct.pack("<5H2I", len(record.name), len(large), 0, 0, 0, 0, min(record.start, _LARGE))
    return fixed + rest + record.name + large


def _end(file: Archive) -> bytes:
    """The end of the directory, as zip64 and as zip."""
    count, begin = len(file.records), file.directory
    length = file.size - begin - 56 - 20 - 22
    large = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 0x031E, 45, 0, 0, count, count, length, begin)
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, begin + length, 1)
    few = min(count, 0xFFFF)
    return (
        large + locator + struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, few, few, min(length, _LARGE), min(begin, _LARGE), 0)
    )
