"""Containers of torch.save: the zip layout (torch 1.6 on) and the old one. Which bytes are which storage, all checked.

A zip is taken as torch writes it: entries stored, named once, within the file, not overlapping. Everything else has
been used to make two readers see two files.

Sources: https://github.com/pytorch/pytorch/blob/v2.9.0/torch/serialization.py (`_legacy_load`, `_load`) and
https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT (zip).
"""

from __future__ import annotations

import hashlib
import io
import os
import struct
import threading
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converter.core.files import sparse
from converter.core.files.checksums import crc32
from converter.core.files.opening import Identity, open_input, pread, read_exact
from converter.core.formats.pickle_machine import PickleValue, read_pickle
from converter.core.formats.pickle_values import Built, Persistent
from converter.core.formats.zip_directory import Read, near, plain_directory, within
from converter.errors import Refused
from converter.text import show

MAX_DIRECTORY = 256_000_000
_LOCAL = 30
"""Bytes of an entry's own header, its name aside."""
_SMALL = 1024
"""A file whose entries take fewer bytes each is read whole for their headers, as ZeRO-3's of placeholders."""
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001


@dataclass(frozen=True, slots=True)
class Record:
    """Bytes of a storage: where they lie in the file, and their CRC-32 where the container has one."""

    offset: int
    length: int
    crc: int | None


@dataclass(frozen=True)
class Container:
    """A torch file taken apart: what its pickle says, and the bytes of its storages by key.

    Attributes:
        name: what torch.save was told to call the file, without its ending; empty in the old layout.
    """

    path: Path
    pickle: PickleValue
    storages: dict[str, Record]
    identity: Identity
    digest: str
    name: str = ""


def read_container(path: Path, *, root: Path | None = None, is_shared: bool = False) -> Container:
    """Take a file of torch.save apart without running anything.

    Args:
        is_shared: the pickle's value is read only, so that files of other ranks that say the same may share it.

    Raises:
        Refused: not such a file (`torch-not`), or one that its directory contradicts (`torch-zip`, `file-truncated`).
    """
    fd = open_input(path, root=root)
    try:
        status = os.fstat(fd)
        start = pread(fd, 512, 0)
        if start.startswith(b"PK\x03\x04"):
            name, pickled, storages, digest = _read_zip(fd, path, status.st_size, is_shared=is_shared)
        elif start[:1] == b"\x80":
            name, (pickled, storages, digest) = "", _read_legacy(fd, path, status.st_size)
        else:
            raise _not_torch(path, start)
    finally:
        os.close(fd)
    return Container(path, pickled, storages, Identity.of(status), digest, name)


def record_sizes(path: Path, *, root: Path | None = None) -> tuple[str, list[int]]:
    """The name of a zip of torch.save, and sizes of its storages, the largest first: no pickle is read.

    Entries' own headers are not looked at, which are spread over the file: only whoever reads storages needs them.

    Raises:
        Refused: not such a file, or one that its directory contradicts, as `read_container` does.
    """
    fd = open_input(path, root=root)
    try:
        start = pread(fd, 512, 0)
        if not start.startswith(b"PK\x03\x04"):
            raise _not_torch(path, start)
        size = os.fstat(fd).st_size
        entries = _checked(fd, path, size, 0, _near(fd, path, 0, size))
    finally:
        os.close(fd)
    if any(e.header_offset + _LOCAL + e.file_size > size for e in entries.values()):
        raise Refused("file-truncated", "the file is cut short inside an entry", where=show(path))
    return _name_of(entries), sorted((e.file_size for n, e in entries.items() if "/data/" in n), reverse=True)


def _name_of(entries: Iterable[str]) -> str:
    """The folder that all entries lie in."""
    return next(iter(entries), "").rpartition("/")[0].partition("/")[0]


def read_member(fd: int, path: Path, *, start: int, length: int) -> Container:
    """Take a file of torch.save apart that is a stretch of another one, as in torch's distributed checkpoints.

    Raises:
        Refused: not such a file (`torch-not`), or not wholly there (`torch-zip`, `file-truncated`).
    """
    status = os.fstat(fd)
    if start + length > status.st_size:
        what = f"the file ends inside the record at byte {start}"
        expected = f"at least {start + length} bytes"
        raise Refused("file-truncated", what, where=show(path), expected=expected, got=f"{status.st_size} bytes")
    head = read_exact(fd, start, min(length, 512), file=str(path))
    if not head.startswith(b"PK\x03\x04"):
        raise _not_torch(path, head)
    _, pickled, storages, digest = _read_zip(fd, path, start + length, base=start, is_shared=True)
    return Container(path, pickled, storages, Identity.of(status), digest)


def _not_torch(path: Path, start: bytes) -> Refused:
    what, facts = "not a file of torch.save", dict[str, str]()
    if start.startswith(b"version https://git-lfs"):
        what = "a git-lfs pointer, not the weights; run: git lfs pull"
        facts = {"instead": "git-lfs"}
    elif start[8:9] == b"{":
        what = "a safetensors file under another name; rename it to .safetensors"
    elif start[257:262] == b"ustar" or (start[:1].isalnum() and b"\0" * 8 in start[:100]):
        what = "a file in the tar layout of 2017; save it again with a newer torch"
    elif not start:
        what = "an empty file"
    return Refused("torch-not", f"this is {what}", where=show(path), facts=facts)


def _zip_error(path: Path, why: str) -> Refused:
    return Refused("torch-zip", f"the zip container can't be trusted: {why}", where=show(path))


class Window(io.RawIOBase):
    """A file descriptor as a file object that only reads, from `start` to `stop`."""

    def __init__(self, fd: int, start: int, stop: int) -> None:
        super().__init__()
        self._fd, self._start, self._stop, self._at = fd, start, stop, start

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a place, counted from `start`."""
        origin = {os.SEEK_SET: self._start, os.SEEK_CUR: self._at, os.SEEK_END: self._stop}[whence]
        if origin + offset < self._start:
            raise OSError("seek before the start")
        self._at = origin + offset
        return self._at - self._start

    def tell(self) -> int:
        """The place, counted from `start`."""
        return self._at - self._start

    def readinto(self, buffer: Any) -> int:
        """Read up to `stop`; the number of bytes."""
        view = memoryview(buffer)[: max(self._stop - self._at, 0)]
        with sparse.reading(self._fd, self._at, len(view)):
            count = os.preadv(self._fd, [view], self._at) if view else 0
        self._at += count
        return count


def _read_zip(
    fd: int, path: Path, size: int, *, base: int = 0, is_shared: bool
) -> tuple[str, PickleValue, dict[str, Record], str]:
    """The zip that lies from `base` to `size`; offsets of its records count from the file's first byte."""
    read = _near(fd, path, base, size)
    entries = _directory(fd, path, size, base, read)
    pickles = [n for n in entries if n.endswith("/data.pkl")]
    if len(pickles) != 1:
        scripted = any(n.endswith(("/constants.pkl", "/code")) for n in entries)
        raise _zip_error(path, "it is a TorchScript archive" if scripted else f"it holds {len(pickles)} data.pkl")
    prefix = pickles[0].removesuffix("data.pkl")
    order = entries.get(prefix + "byteorder")
    if order is not None and read(order.offset, min(order.length, 16)) != b"little":
        raise _zip_error(path, "its numbers are not little-endian")
    record = entries[pickles[0]]
    raw = read(record.offset, record.length) if record.length <= MAX_DIRECTORY else b""
    if record.crc is not None and crc32(raw) != record.crc:
        raise _zip_error(path, "data.pkl fails its checksum")
    pickled = _shared.read(raw, str(path)) if is_shared else read_pickle(io.BytesIO(raw), where=str(path))
    data = prefix + "data/"
    digest = hashlib.sha256(raw)
    digest.update(repr(sorted((n, r.length, r.crc) for n, r in entries.items())).encode())
    storages = {n.removeprefix(data): r for n, r in entries.items() if n.startswith(data)}
    return prefix.removesuffix("/"), pickled, storages, digest.hexdigest()


class _Shared:
    """Pickles that were read last, by their bytes: the records of a mixture and the files of ranks repeat a few."""

    def __init__(self, most: int, most_bytes: int) -> None:
        self._most, self._most_bytes = most, most_bytes
        self._known: dict[bytes, PickleValue] = {}
        self._bytes = 0
        self._lock = threading.Lock()

    def read(self, raw: bytes, where: str) -> PickleValue:
        """What the pickle says; never to be changed."""
        with self._lock:
            if (known := self._known.get(raw)) is not None:
                return known
        found = read_pickle(io.BytesIO(raw), where=where)
        with self._lock:
            if raw not in self._known and len(raw) <= self._most_bytes:
                self._known[raw] = found
                self._bytes += len(raw)
            while len(self._known) > self._most or self._bytes > self._most_bytes:
                oldest = next(iter(self._known))
                del self._known[oldest]
                self._bytes -= len(oldest)
        return found


_shared = _Shared(512, 4_000_000)
"""A value takes six times the memory of its pickle (measured: 0.24 MB for 38.6 KB)."""


def _near(fd: int, path: Path, start: int, stop: int) -> Read:
    def read(offset: int, length: int) -> bytes:
        return read_exact(fd, offset, length, file=str(path))

    return near(read, start, stop)


def _directory(fd: int, path: Path, size: int, base: int, read: Read) -> dict[str, Record]:
    """Entries by name, each checked against its local header."""
    entries = _checked(fd, path, size, base, read)
    if len(entries) * _SMALL > size - base:  # headers lie close together: read once they are not read one by one
        read = within(read(base, size - base), base)
    found = {name: _located(path, size, base, entry, read) for name, entry in entries.items()}
    end = 0
    for name, record in sorted(found.items(), key=lambda item: item[1].offset):
        if record.offset < end:
            raise _zip_error(path, f"the entry {show(name)} overlaps another")
        end = record.offset + record.length
    return found


def _checked(fd: int, path: Path, size: int, base: int, read: Read) -> dict[str, zipfile.ZipInfo]:
    """Entries of the directory by name, all of them stored as they are."""
    listed = plain_directory(read, base, size)
    if listed is None:
        listed = _listed(fd, path, size, base)
    # Readers that look for the directory from the front and from the end must find one and the same.
    if min((i.header_offset for i in listed), default=0):
        raise _zip_error(path, "something lies before or behind it; torch writes nothing but the zip")
    found: dict[str, zipfile.ZipInfo] = {}
    for info in listed:
        if info.filename in found or info.orig_filename != info.filename:
            raise _zip_error(path, f"the entry {show(info.filename)} stands in it twice or under two names")
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 0x41 or info.file_size != info.compress_size:
            raise _zip_error(path, f"the entry {show(info.filename)} is compressed or encrypted; torch stores entries")
        found[info.filename] = info
    return found


def _listed(fd: int, path: Path, size: int, base: int) -> list[zipfile.ZipInfo]:
    """Entries in the order of the directory, with nothing in front of the zip or behind it."""
    try:
        with zipfile.ZipFile(io.BufferedReader(Window(fd, base, size))) as archive:
            listed = archive.infolist()
            comment = archive.comment
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error, UnicodeError) as error:
        truncated = "File is not a zip file" in str(error)
        if truncated:
            raise Refused(
                "file-truncated", "the file begins as a torch file and has no end: it is cut short", where=show(path)
            ) from error
        raise _zip_error(path, show(error)) from error
    if comment or pread(fd, 4, size - 22) != b"PK\x05\x06":
        raise _zip_error(path, "something lies before or behind it; torch writes nothing but the zip")
    return listed


def _located(path: Path, size: int, base: int, info: zipfile.ZipInfo, read: Read) -> Record:
    at = base + info.header_offset
    if not base <= at <= size - 30:
        raise _zip_error(path, f"the entry {show(info.filename)} lies outside the file")
    header = read(at, min(30 + len(info.orig_filename.encode(errors="replace")), size - at))
    name_length, extra_length = struct.unpack_from("<HH", header, 26)
    name = header[30:] if len(header) == 30 + name_length else read(at + 30, name_length)
    if header[:4] != b"PK\x03\x04" or name.decode("utf-8", "replace") != info.orig_filename:
        raise _zip_error(path, f"the entry {show(info.filename)} has another name in its own header")
    offset = at + 30 + name_length + extra_length
    if offset + info.file_size > size:
        raise Refused("file-truncated", f"the file is cut short inside {show(info.filename)}", where=show(path))
    # torch.serialization.set_crc32_options(False) writes zeros.
    return Record(offset, info.file_size, info.CRC if info.CRC or not info.file_size else None)


_ITEM_BYTES = {
    "Float": 4, "Double": 8, "Half": 2, "BFloat16": 2, "Long": 8, "Int": 4, "Short": 2, "Char": 1, "Byte": 1, "Bool": 1,
    "ComplexFloat": 8, "ComplexDouble": 16, "QInt8": 1, "QUInt8": 1, "QInt32": 4, "Untyped": 1,
}  # fmt: skip


def storage_type(reference: Any) -> str:
    """`Float` of `torch.FloatStorage`; empty where it is not a storage type."""
    name = getattr(reference, "name", "")
    return name.removesuffix("Storage") if isinstance(name, str) and name.endswith("Storage") else ""


def item_bytes(kind: str) -> int:
    """Bytes of one element of a storage type; 0 where it is unknown."""
    return _ITEM_BYTES.get(kind, 0)


def _read_legacy(fd: int, path: Path, size: int) -> tuple[PickleValue, dict[str, Record], str]:
    """Five pickles (magic, protocol, system, value, keys), then each storage: its length and its bytes."""
    file = io.BufferedReader(Window(fd, 0, size))
    where = str(path)
    if read_pickle(file, where=where).value != LEGACY_MAGIC:
        raise _not_torch(path, b"?")
    if read_pickle(file, where=where).value != LEGACY_PROTOCOL:
        raise _not_torch(path, b"?")
    system = read_pickle(file, where=where).value
    if isinstance(system, dict) and system.get("little_endian") is False:
        raise _not_torch(path, b"?")
    value = read_pickle(file, where=where)
    keys = read_pickle(file, where=where)
    kinds = _storage_kinds(value.value)
    storages: dict[str, Record] = {}
    position = file.tell()
    digest = hashlib.sha256(read_exact(fd, 0, position, file=where)).hexdigest()
    for key in keys.value if isinstance(keys.value, list) else []:
        (count,) = struct.unpack("<q", read_exact(fd, position, 8, file=where))
        length = count * kinds.get(str(key), 0)
        if count < 0 or str(key) not in kinds or str(key) in storages or position + 8 + length > size:
            raise Refused("file-truncated", f"the storage {show(key)} is not wholly in the file", where=show(path))
        storages[str(key)] = Record(position + 8, length, None)
        position += 8 + length
    return PickleValue(value.value, value.names | keys.names), storages, digest


def _storage_kinds(value: Any) -> dict[str, int]:
    """Bytes an element of every storage that a value refers to, by key; walked without recursion."""
    found: dict[str, int] = {}
    seen: set[int] = set()
    todo = [value]
    while todo:
        item = todo.pop()
        if isinstance(item, str | int | float | bytes | None) or id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Persistent):
            identity = item.identity
            if isinstance(identity, tuple) and len(identity) >= 5 and identity[0] == "storage":
                found[str(identity[2])] = item_bytes(storage_type(identity[1]))
        elif isinstance(item, dict):
            todo += item.values()
        elif isinstance(item, list | tuple):
            todo += item
        elif isinstance(item, Built):
            todo += [*item.args, item.state, *item.items, item.kwargs]
    return found
