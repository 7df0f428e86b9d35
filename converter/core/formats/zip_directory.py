"""The directory of a zip as torch writes it, taken from two stretches of the file: its start and its end.

A distributed checkpoint of a large mixture is fifty thousand zips in a few files; `zipfile` reads each in a dozen small
pieces. Whatever is not of the plain form (zip64, comments, odd names) is None here, and is left to `zipfile`.
"""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Callable

NEAR = 4096
"""Bytes of a zip's start and of its end: headers, the pickle of one tensor, the directory."""

Read = Callable[[int, int], bytes]
"""Bytes from an offset, as many as are asked for."""

_END = struct.Struct("<4s4H2LH")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR = struct.Struct("<4sLQL")
_CENTRAL, _BEHIND = b"PK\x01\x02", b"PK\x07\x08"
_MOST, _MOST_BYTES = 0xFFFF, 16_000_000
_NEEDED = 45
"""The version of the format that 64 bits need; what asks for a newer one is not of torch."""


def near(read: Read, start: int, stop: int) -> Read:
    """The same reader, with the start and the end of a stretch read once."""
    if stop - start <= 2 * NEAR:
        held = [(start, read(start, stop - start))]
    else:
        held = [(start, read(start, NEAR)), (stop - NEAR, read(stop - NEAR, NEAR))]

    def read_near(offset: int, length: int) -> bytes:
        for at, data in held:
            if at <= offset and offset + length <= at + len(data):
                return data[offset - at : offset - at + length]
        return read(offset, length)

    return read_near


def within(data: bytes, start: int) -> Read:
    """A reader of what was read already, from `start` on; of no more than that."""

    def read_within(offset: int, length: int) -> bytes:
        return data[offset - start : offset - start + length]

    return read_within


def plain_directory(read: Read, start: int, stop: int) -> list[zipfile.ZipInfo] | None:
    """Entries of the zip from `start` to `stop`, as `zipfile` lists them; None where it isn't plain."""
    if stop - start < _END.size:
        return None
    signature, disk, first, here, count, size, at, comment = _END.unpack(read(stop - _END.size, _END.size))
    if signature != b"PK\x05\x06" or disk or first or comment or here != count or not 0 < count < _MOST:
        return None
    if not _ends_at(read, start, stop - _END.size, (count, size, at)) or size > _MOST_BYTES:
        return None
    raw = read(start + at, size)
    found = []
    position = 0
    for _ in range(count):
        if position + _ENTRY.size > size:
            return None
        entry = _ENTRY.unpack_from(raw, position)
        name = raw[position + _ENTRY.size :][: entry[10]]
        if entry[0] != b"PK\x01\x02" or entry[11] or entry[12] or entry[13] or not _is_plain(name, entry[10]):
            return None
        if entry[2] & 0xFF > _NEEDED:
            return None
        if 0xFFFFFFFF in (entry[8], entry[9], entry[16]):
            return None
        info = zipfile.ZipInfo(name.decode("ascii"))
        info.flag_bits, info.compress_type, info.CRC = entry[3], entry[4], entry[7]
        info.compress_size, info.file_size, info.header_offset = entry[8], entry[9], entry[16]
        found.append(info)
        position += _ENTRY.size + entry[10]
    return found if position == size else None


def value_checksum(tail: bytes) -> list[tuple[int, int]] | None:
    """What differs behind the values of two records that are otherwise alike, where they hold one tensor, `data/0`.

    Args:
        tail: the record from the end of its values on, directory included.

    Returns:
        The checksum of the values in the directory, then other stretches that depend on the values: the checksum behind
        them, and torch's `serialization_id` with its own. None where the tail is not of the form that torch writes.
    """
    size, at = _END.unpack(tail[-_END.size :])[5:7] if len(tail) >= _END.size else (0, 0)
    end = len(tail) - _END.size
    begin = next((e - size for e in (end, end - _END64.size - _LOCATOR.size) if tail[e - size :][:4] == _CENTRAL), -1)
    if begin < 0 or size < _ENTRY.size or tail[:4] != _BEHIND:
        return None
    behind = at - begin
    checksum: tuple[int, int] | None = None
    others = [(4, 8)]
    position = begin
    while position + _ENTRY.size <= begin + size:
        entry = _ENTRY.unpack_from(tail, position)
        name = tail[position + _ENTRY.size :][: entry[10]]
        if name.endswith(b"/data/0"):
            checksum = (position + 16, position + 20)
        elif name.endswith(b"/.data/serialization_id"):
            local = entry[16] - behind
            if not 0 <= local <= begin - 30:
                return None
            content = local + 30 + sum(struct.unpack("<HH", tail[local + 26 : local + 30]))
            crc = content + entry[9] + 4
            if tail[crc - 4 : crc] != _BEHIND or crc + 4 > begin:
                return None
            others += [(content, content + entry[9]), (crc, crc + 4), (position + 16, position + 20)]
        position += _ENTRY.size + sum(entry[10:13])
    return None if checksum is None else [checksum, *others]


def _ends_at(read: Read, start: int, stop: int, said: tuple[int, int, int]) -> bool:
    """True where nothing but a record that says the same in 64 bits, as torch always writes, is behind a directory."""
    count, size, at = said
    end = start + at + size
    if end == stop:
        return True
    if end + _END64.size + _LOCATOR.size != stop:
        return False
    record = _END64.unpack(read(end, _END64.size))
    locator = _LOCATOR.unpack(read(end + _END64.size, _LOCATOR.size))
    wanted = (b"PK\x06\x06", _END64.size - 12, 0, 0, count, count, size, at)
    return (*record[:2], *record[4:]) == wanted and locator == (b"PK\x06\x07", 0, end - start, 1)


def _is_plain(name: bytes, length: int) -> bool:
    return len(name) == length > 0 and name.isascii() and b"\0" not in name and b"\\" not in name
