"""A plan that reads from more files than a process may hold open at first."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from converter.core.files.reading import InputFiles


@pytest.fixture
def few() -> Iterator[int]:
    """A limit of a few more descriptors than are open, which may be raised again."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = max(map(int, os.listdir("/proc/self/fd"))) + 8
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, before[1]))
    yield limit
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_more_files_than_the_first_limit_are_read(few: int, tmp_path: Path) -> None:
    paths = [tmp_path / f"{n}.bin" for n in range(few + 40)]
    for number, path in enumerate(paths):
        path.write_bytes(bytes([number % 256]))
    buffer = bytearray(1)
    with InputFiles({}) as files:
        for number, path in enumerate(paths):
            files.read_into(str(path), 0, buffer)
            assert buffer[0] == number % 256
