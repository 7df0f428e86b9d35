"""Checksums of records, of which bytes were summed while they were read: the sums of zlib, however they were read."""

from __future__ import annotations

import random
import zlib
from pathlib import Path

import pytest

from converter.core.checkpoint import RecordCheck
from converter.core.files.opening import identity
from converter.core.files.reading import InputFiles
from converter.core.writer.record_checks import compare_records
from converter.errors import Refused

RAW = random.Random(0).randbytes(100_000)
RECORDS = ((1_000, 50_000), (60_000, 3_000))


def read_somehow(files: InputFiles, path: str, seed: int) -> None:
    """Stretches that follow one another, overlap and repeat, each in several reads."""
    numbers = random.Random(seed)
    for _ in range(numbers.randrange(12)):
        at = numbers.randrange(0, 99_000)
        stop = min(at + numbers.randrange(1, 9_000), len(RAW))
        while at < stop:
            length = min(numbers.randrange(1, 3_000), len(RAW) - at)
            files.read_into(path, at, bytearray(length))
            at += length


@pytest.mark.parametrize("seed", range(40))
def test_a_record_has_the_checksum_of_its_bytes_whichever_of_them_were_read_before(tmp_path: Path, seed: int) -> None:
    file = tmp_path / "rank.pt"
    file.write_bytes(RAW)
    path = str(file)
    checks = [RecordCheck(path, at, length, zlib.crc32(RAW[at : at + length])) for at, length in RECORDS]
    with InputFiles({path: identity(path)}, {path}) as files:
        read_somehow(files, path, seed)
        compare_records(checks, files, 2)
        with pytest.raises(Refused, match="fail the checksum"):
            compare_records([RecordCheck(path, 1_000, 50_000, checks[0].crc ^ 1)], files, 2)


def test_what_was_read_whole_is_not_read_again(tmp_path: Path) -> None:
    file = tmp_path / "rank.pt"
    file.write_bytes(RAW)
    path = str(file)
    with InputFiles({path: identity(path)}, {path}) as files:
        for at in range(0, len(RAW), 7_000):
            files.read_into(path, at, bytearray(min(7_000, len(RAW) - at)))
        file.write_bytes(bytes(len(RAW)))
        compare_records([RecordCheck(path, 0, len(RAW), zlib.crc32(RAW))], files, 1)
