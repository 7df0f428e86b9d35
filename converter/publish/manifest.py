"""The files of a folder that belong on the Hub, with their digests."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from converter.core.files.names import ADAPTER_CONFIG, CARD, MODEL_CONFIG, RECEIPT, WEIGHTS_WORD
from converter.core.files.opening import open_input
from converter.core.side_files import travels
from converter.diagnostic import Command
from converter.errors import Refused
from converter.text import show

MAX_FILE = 50_000_000_000
"""Bytes of one file that the Hub takes. Source: https://huggingface.co/docs/hub/repositories-recommendations"""

MOST_FILES = 20_000
"""Files of one commit; the Hub advises 25,000."""

_WEIGHTS = re.compile(rf"(?:modeling/)?(?:{WEIGHTS_WORD}|value_head)[\w.-]*\.(?:safetensors|bin|pt|json)", re.ASCII)

_BLOCK = 1 << 22


@dataclass(frozen=True)
class LocalFile:
    """A file to push; `content` stands in for a file that is made in memory (the card)."""

    name: str
    path: Path
    size: int
    content: bytes | None = None

    def digests(self, told: Callable[[int, str], None] | None = None) -> tuple[str, str]:
        """sha256 of the bytes, and git's own name of the blob; `told` hears of every block."""
        sha = hashlib.sha256()
        blob = hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)
        for block in self._blocks():
            sha.update(block)
            blob.update(block)
            if told is not None:
                told(len(block), self.name)
        return sha.hexdigest(), blob.hexdigest()

    def _blocks(self) -> Iterator[bytes]:
        if self.content is not None:
            yield self.content
            return
        fd = open_input(self.path)
        try:
            while block := os.read(fd, _BLOCK):
                yield block
        finally:
            os.close(fd)


@dataclass(frozen=True)
class Manifest:
    """What goes into the repository.

    Attributes:
        digests: file name mapped to its sha256 and its git blob id.
        left_out: names of files in the folder that do not go.
    """

    files: tuple[LocalFile, ...]
    digests: Mapping[str, tuple[str, str]]
    left_out: tuple[str, ...]

    @property
    def total_bytes(self) -> int:
        """Bytes of all files."""
        return sum(f.size for f in self.files)


def files_to_push(folder: Path, *, keep_code: bool) -> tuple[list[LocalFile], list[str]]:
    """The files of a folder that belong on the Hub, and the names of those that do not.

    Raises:
        Refused: a link out of the folder or no regular file (`input-outside`, ...), a file that the Hub does not take.
    """
    found, left_out = [], []
    for path in sorted(p for p in folder.rglob("*") if not p.is_dir()):
        name = path.relative_to(folder).as_posix()
        is_ours = _WEIGHTS.fullmatch(name) or name in (MODEL_CONFIG, ADAPTER_CONFIG, RECEIPT, CARD)
        if not is_ours and not travels(name, keep_code=keep_code):
            left_out.append(name)
            continue
        fd = open_input(path, root=folder)
        size = os.fstat(fd).st_size
        os.close(fd)
        if size > MAX_FILE:
            raise Refused(
                "hub-file-too-large",
                f"{show(name)} has {size} bytes, and the Hub takes {MAX_FILE} in one file",
                next=Command("reshard", ("DIR", "OUT", "--max-shard-size", "5GB")),
            )
        found.append(LocalFile(name, path, size))
    if len(found) > MOST_FILES:
        raise Refused("hub-too-many-files", f"{len(found)} files are too many for one commit", where=show(folder))
    return found, left_out


def manifest(files: Sequence[LocalFile], left_out: Sequence[str], *, told: Callable[[int, str], None]) -> Manifest:
    """Digests of every file; `told` hears of every block that is read, and of which file."""
    digests = {}
    for file in files:
        digests[file.name] = file.digests(told)
    return Manifest(tuple(files), digests, tuple(left_out))
