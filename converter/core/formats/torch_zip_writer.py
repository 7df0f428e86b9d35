"""Torch's zip format, written: the pickle, the records and the directory around tensors that are written in place.

The bytes are those that torch.save (2.7 and later) writes of an OrderedDict of contiguous CPU tensors, but for the
serialization id, which torch derives from the order of a C++ hash set. A zip says each record's CRC-32 after its data
and in its directory: `archive` knows every place before any byte is written, `closing` fills in the checksums.

Sources: https://github.com/pytorch/pytorch/blob/v2.9.0/torch/serialization.py (`_save`),
https://github.com/pytorch/pytorch/blob/v2.9.0/caffe2/serialize/inline_container.cc (records, alignment, ids),
https://docs.python.org/3/library/pickletools.html (protocol 2).
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from converter.core.files.checksums import crc32
from converter.core.tensors.dtypes import DType, TensorInfo
from converter.errors import Refused
from converter.text import show

ALIGNMENT = 64
"""Storages begin at multiples of this, and so does every other record."""

_STORAGES = {
    DType.F32: "Float", DType.F64: "Double", DType.F16: "Half", DType.BF16: "BFloat16", DType.I64: "Long",
    DType.I32: "Int", DType.I16: "Short", DType.I8: "Char", DType.U8: "Byte", DType.BOOL: "Bool",
    DType.C64: "ComplexFloat",
}  # fmt: skip
"""Element types with a storage class of their own."""

_UNTYPED = frozenset(
    (DType.F8_E4M3, DType.F8_E5M2, DType.F8_E4M3FNUZ, DType.F8_E5M2FNUZ, DType.F8_E8M0, DType.U16, DType.U32, DType.U64)
)
"""Newer ones: bytes in the file, and the type beside the shape."""

_BATCH = 1000
"""Items that the C pickler sets with one opcode. Source: `BATCHSIZE` in CPython's Modules/_pickle.c."""

_LARGE = 0xFFFFFFFF
"""Sizes and offsets from here on are written in zip64 fields."""

_HAS_DESCRIPTOR, _UTF8 = 0x0008, 0x0800
_ID_DIGITS = 40


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


def is_writable(dtype: DType) -> bool:
    """True where torch has a type that a file can name."""
    return dtype in _STORAGES or dtype in _UNTYPED


def archive(file: str, tensors: Sequence[tuple[str, TensorInfo]]) -> Archive:
    """The layout of `file` with these tensors, at least one; each gets a storage of its own.

    Raises:
        Refused: a type that torch doesn't have, or packs differently (`torch-dtype`).
    """
    for name, info in tensors:
        if not is_writable(info.dtype):
            what = f"torch's files can't hold {show(name)}: torch has no {info.dtype.value} as it is stored here"
            raise Refused("torch-dtype", what, next="write safetensors, or another --dtype")
    stem = file.rpartition("/")[2].rpartition(".")[0].encode()
    contents: list[tuple[str, bytes | None, int]] = [
        (name, content, len(content))
        for name, content in (
            ("data.pkl", _pickle(tensors)),
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
    version, identity = file.records[-2:]
    named = int.from_bytes(hashlib.sha256(file.records[0].content or b"").digest()[:8], "big")
    summed = crc32(struct.pack(f"<{len(checksums)}I", *checksums))
    known = {version: version.content or b"", identity: b"%020d%020d" % (named, summed)}
    parts = [_after(last, found[last])]
    for record, content in known.items():
        found[record] = crc32(content)
        parts += [_local_header(record), content, _after(record, found[record])]
    parts += [_entry(r, found.get(r, _crc(r))) for r in file.records]
    yield last.offset + last.size, b"".join(parts) + _end(file)


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


# The pickle


class _Pickler:
    """Opcodes of protocol 2, as CPython's pickler writes them: objects are noted, and referred to when used again."""

    def __init__(self) -> None:
        self.out = bytearray(b"\x80\x02")
        self._noted: dict[str, int] = {}
        self._count = 0

    def note(self, name: str | None = None) -> None:
        """Give the object on the stack its number."""
        number = self._count
        self._count += 1
        self.out += struct.pack("<cB", b"q", number) if number < 256 else struct.pack("<cI", b"r", number)
        if name is not None:
            self._noted[name] = number

    def _again(self, name: str) -> bool:
        number = self._noted.get(name)
        if number is not None:
            self.out += struct.pack("<cB", b"h", number) if number < 256 else struct.pack("<cI", b"j", number)
        return number is not None

    def symbol(self, module: str, name: str) -> None:
        """A class or function, by name."""
        if not self._again(f"{module} {name}"):
            self.out += f"c{module}\n{name}\n".encode()
            self.note(f"{module} {name}")

    def text(self, value: str, *, constant: bool = False) -> None:
        """A string; a constant is one object wherever it stands."""
        if not (constant and self._again("'" + value)):
            raw = value.encode(errors="surrogatepass")
            self.out += struct.pack("<cI", b"X", len(raw)) + raw
            self.note("'" + value if constant else None)

    def count(self, value: int) -> None:
        """A number from 0."""
        if value < 1 << 8:
            self.out += struct.pack("<cB", b"K", value)
        elif value < 1 << 16:
            self.out += struct.pack("<cH", b"M", value)
        elif value < 1 << 31:
            self.out += struct.pack("<ci", b"J", value)
        else:
            raw = value.to_bytes(value.bit_length() // 8 + 1, "little")
            self.out += struct.pack("<cB", b"\x8a", len(raw)) + raw

    def counts(self, values: Sequence[int]) -> None:
        """A tuple of numbers."""
        if not values:
            self.out += b")"
            return
        if len(values) > 3:
            self.out += b"("
        for value in values:
            self.count(value)
        self.out += {1: b"\x85", 2: b"\x86", 3: b"\x87"}.get(len(values), b"t")
        self.note()

    def empty_dict(self, name: str | None = None) -> None:
        """An OrderedDict."""
        self.symbol("collections", "OrderedDict")
        self.out += b")R"
        self.note(name)


def _pickle(tensors: Sequence[tuple[str, TensorInfo]]) -> bytes:
    """An OrderedDict of tensors, each on a storage named by its number."""
    made = _Pickler()
    made.empty_dict()
    for begin in range(0, len(tensors), _BATCH):
        batch = tensors[begin : begin + _BATCH]
        made.out += b"(" if len(batch) > 1 else b""
        for key, (name, info) in enumerate(batch, begin):
            made.text(name)
            _pickle_tensor(made, key, info)
        made.out += b"u" if len(batch) > 1 else b"s"
    return bytes(made.out + b".")


def _pickle_tensor(made: _Pickler, key: int, info: TensorInfo) -> None:
    kind = _STORAGES.get(info.dtype)
    made.symbol("torch._utils", "_rebuild_tensor_v2" if kind else "_rebuild_tensor_v3")
    made.out += b"(("
    made.text("storage", constant=True)
    made.symbol(*(("torch", f"{kind}Storage") if kind else ("torch.storage", "UntypedStorage")))
    made.text(str(key))
    made.text("cpu", constant=True)
    made.count(info.numel if kind else info.nbytes)
    made.out += b"t"
    made.note()
    made.out += b"Q"
    made.count(0)
    made.counts(info.shape)
    made.counts(_strides(info.shape))
    made.out += b"\x89"  # requires_grad: False
    made.empty_dict()  # backward hooks
    if not kind:
        made.symbol("torch", info.dtype.torch_name)
    made.out += b"t"
    made.note()
    made.out += b"R"
    made.note()


def _strides(shape: Sequence[int]) -> list[int]:
    """Elements from one index to the next of each dimension, rows after rows; torch counts empty ones as 1."""
    strides = [1]
    for length in reversed(shape[1:]):
        strides.append(strides[-1] * max(length, 1))
    return strides[::-1] if shape else []
