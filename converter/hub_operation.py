"""A file of a commit that tells how much of it was read to be sent."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


def addition(name: str, source: str | bytes, told: Callable[[int], None]) -> Any:
    """The client's operation for a file, from a path or from bytes; `told` is called with counts of bytes."""
    from huggingface_hub import CommitOperationAdd

    class Addition(CommitOperationAdd):
        @contextmanager
        def as_file(self, with_tqdm: bool = False) -> Iterator[Any]:
            """The content to read; without the client's own bar."""
            with super().as_file(with_tqdm=False) as file:
                yield _Counted(file, told)

    return Addition(path_in_repo=name, path_or_fileobj=source)


class _Counted:
    """A file whose reads are counted."""

    def __init__(self, file: Any, told: Callable[[int], None]) -> None:
        self._file, self._told = file, told

    def read(self, size: int = -1) -> bytes:
        block: bytes = self._file.read(size)
        self._told(len(block))
        return block

    def __iter__(self) -> Iterator[bytes]:
        while block := self.read(1 << 16):
            yield block

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)
