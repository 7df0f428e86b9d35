"""From chunks back to tensors: each is a box of its tensor, and a record of torch.save somewhere in a file."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from converter.core.checkpoint import RecordCheck
from converter.core.files.opening import Identity, open_input
from converter.core.formats.torch_file import read_torch_member
from converter.core.formats.torch_members import Kind, Members
from converter.core.tensors import nodes as tensors
from converter.core.tensors.dtypes import TensorInfo
from converter.core.tensors.nodes import Filled, LazyTensor, Stored
from converter.errors import Refused
from converter.sources.dcp.copied_files import Record, expect_no_copies
from converter.sources.dcp.metadata import METADATA, Chunk, Entry, Metadata, Place
from converter.text import fold, show

MAX_CUTS = 64


@dataclass
class Pieces:
    """What is read of a checkpoint's files: tensors, and what must hold of the bytes they are made of."""

    metadata: Metadata
    checks: list[RecordCheck] = field(default_factory=list)
    inputs: dict[str, Identity] = field(default_factory=dict)
    _digests: list[tuple[str, int, str]] = field(default_factory=list)
    _kinds: dict[int, list[Kind]] = field(default_factory=dict)
    _own: list[Record] = field(default_factory=list)

    @property
    def digest(self) -> str:
        """sha256 over `.metadata` and the headers of the records read."""
        text = repr((self.metadata.digest, sorted(self._digests)))
        return hashlib.sha256(text.encode()).hexdigest()

    def read(self, keys: Iterable[str]) -> dict[str, LazyTensor]:
        """Whole tensors by key.

        Raises:
            Refused: files missing (`dcp-file-missing`) or cut short (`file-truncated`), chunks that do not make up
                their tensor (`dcp-chunks`), or records that are not what `.metadata` says, or
                another file's (`dcp-record`).
        """
        wanted = {key: self._places(key) for key in keys}
        self._expect_files(wanted)
        records = self._records(wanted)
        expect_no_copies(self.metadata.folder, self._own)
        found = {}
        for key, places in wanted.items():
            entry = self.metadata.tensors[key]
            boxes = [(chunk, records[key, chunk.offsets]) for chunk in places]
            found[key] = self._assembled(key, entry, boxes)
        folder = self.metadata.folder
        self.inputs[str((folder / METADATA).absolute())] = self.metadata.identity
        return found

    def objects(self, keys: Iterable[str]) -> dict[str, Any]:
        """What is not a tensor, by key, as its pickle says it.

        Raises:
            Refused: in no file (`dcp-chunks`), files missing or cut short, or a record that can't be read.
        """
        found: dict[str, Any] = {}
        folder = self.metadata.folder
        for key in keys:
            place = self.metadata.places.get((key, ()))
            if place is None:
                raise self.metadata.refuse("dcp-chunks", f"{show(key)} is in no file")
            if not (folder / place.file).exists():
                raise self.metadata.refuse("dcp-file-missing", f"{show(place.file)} is missing, with {show(key)} in it")
            fd = open_input(folder / place.file, root=folder)
            try:
                self.inputs[str((folder / place.file).absolute())] = Identity.of(os.fstat(fd))
                read = read_torch_member(fd, folder / place.file, start=place.offset, length=place.length)
            finally:
                os.close(fd)
            self._digests.append((place.file, place.offset, read.digest))
            self.checks += read.checks
            found[key] = read.value
        return found

    def _places(self, key: str) -> dict[Chunk, Place]:
        """Where each chunk that holds anything lies; replicas have one place, the one that torch would read."""
        found = {}
        for chunk in self.metadata.tensors[key].chunks:
            if 0 in chunk.sizes:
                continue
            place = self.metadata.places.get((key, chunk.offsets))
            if place is None and not any(chunk.offsets):
                place = self.metadata.places.get((key, ()))
            if place is None:
                text = f"the chunk of {show(key)} at {list(chunk.offsets)} is in no file"
                raise self.metadata.refuse("dcp-chunks", text)
            found[chunk] = place
        return found

    def _expect_files(self, wanted: Mapping[str, Mapping[Chunk, Place]]) -> None:
        folder = self.metadata.folder
        needed: dict[str, list[str]] = {}
        for key, places in wanted.items():
            for place in places.values():
                needed.setdefault(place.file, []).append(key)
        missing = {f: keys for f, keys in needed.items() if not (folder / f).exists()}
        if missing:
            lost = list(dict.fromkeys(k for keys in missing.values() for k in keys))
            raise self.metadata.refuse(
                "dcp-file-missing",
                f"{len(missing)} of {len(needed)} files are missing: {fold([show(f) for f in sorted(missing)])}. With "
                f"them pieces of {len(lost)} tensors are lost: {fold([show(k) for k in lost])}",
                next="copy them from the nodes that wrote them; nothing else holds these values",
            )

    def _records(self, wanted: Mapping[str, Mapping[Chunk, Place]]) -> dict[tuple[str, tuple[int, ...]], LazyTensor]:
        """Each chunk's record as a lazy tensor; a file is opened once, and read from its start to its end."""
        by_file: dict[str, list[tuple[Place, str, Chunk]]] = {}
        for key, places in wanted.items():
            for chunk, place in places.items():
                by_file.setdefault(place.file, []).append((place, key, chunk))
        found: dict[tuple[str, tuple[int, ...]], LazyTensor] = {}
        for file, items in by_file.items():
            path = self.metadata.folder / file
            fd = open_input(path, root=self.metadata.folder)
            try:
                self.inputs[str(path.absolute())] = Identity.of(os.fstat(fd))
                members = Members(fd, path)
                for place, key, chunk in sorted(items, key=lambda item: item[0].offset):
                    found[key, chunk.offsets] = self._record(members, place, key, chunk)
            finally:
                os.close(fd)
        return found

    def _record(self, members: Members, place: Place, key: str, chunk: Chunk) -> LazyTensor:
        entry = self.metadata.tensors[key]
        path = self.metadata.folder / place.file
        try:
            read = members.read(place.offset, place.length, self._kinds)
        except Refused as error:
            error.what = f"{error.what} (the record of {show(key)} at byte {place.offset})"
            raise
        value = read.value
        if not isinstance(value, LazyTensor) or value.info != TensorInfo(entry.dtype or value.info.dtype, chunk.sizes):
            got = f"{value.info.dtype.value} {list(value.info.shape)}" if isinstance(value, LazyTensor) else "no tensor"
            raise Refused(
                "dcp-record",
                f"the record of {show(key)} at byte {place.offset} is not what {METADATA} says: a file of another save",
                where=show(path),
                expected=f"{entry.kind} {list(chunk.sizes)}",
                got=got,
            )
        tensor: LazyTensor = value
        self.checks += read.checks
        if isinstance(tensor, Stored) and len(read.checks) == 1:
            self._own.append(Record(key, tensor, read.checks[0]))
        self._digests.append((place.file, place.offset, read.digest))
        return tensor

    def _assembled(self, key: str, entry: Entry, boxes: list[tuple[Chunk, LazyTensor]]) -> LazyTensor:
        if entry.dtype is None:
            text = f"{show(key)} has the element type {show(entry.kind)}, which safetensors has no name for"
            raise self.metadata.refuse("torch-tensor-kind", text)
        if 0 in entry.shape:
            return Filled(TensorInfo(entry.dtype, entry.shape), 0)
        whole = Chunk((0,) * len(entry.shape), entry.shape)
        found = tiled(boxes, whole)
        if found is None:
            listed = ", ".join(f"{list(c.offsets)}+{list(c.sizes)}" for c, _ in boxes[:8]) or "none"
            text = f"the chunks of {show(key)} {list(entry.shape)} leave gaps or overlap: {listed}"
            raise self.metadata.refuse("dcp-chunks", text)
        return found


def tiled(boxes: list[tuple[Chunk, LazyTensor]], whole: Chunk, depth: int = 0) -> LazyTensor | None:
    """Boxes laid together where they fill `whole` exactly, by cuts that go all the way through; else None.

    Meshes cut one dimension after the other, so there always is such a cut.
    """
    if len(boxes) == 1:
        return boxes[0][1] if boxes[0][0] == whole else None
    if depth > MAX_CUTS:
        return None
    for dim in range(len(whole.sizes)):
        groups = _cut(boxes, dim)
        if len(groups) < 2:
            continue
        starts = [min(c.offsets[dim] for c, _ in g) for g in groups]
        end = whole.offsets[dim] + whole.sizes[dim]
        if starts[0] != whole.offsets[dim]:
            return None
        parts = []
        for group, (start, stop) in zip(groups, pairwise([*starts, end]), strict=True):
            offsets = (*whole.offsets[:dim], start, *whole.offsets[dim + 1 :])
            sizes = (*whole.sizes[:dim], stop - start, *whole.sizes[dim + 1 :])
            part = tiled(group, Chunk(offsets, sizes), depth + 1)
            if part is None:
                return None
            parts.append(part)
        return tensors.concat(parts, dim)
    return None


def _cut(boxes: list[tuple[Chunk, LazyTensor]], dim: int) -> list[list[tuple[Chunk, LazyTensor]]]:
    """Groups along a dimension, such that no box reaches into the next group."""
    groups: list[list[tuple[Chunk, LazyTensor]]] = []
    reached = -1
    for box in sorted(boxes, key=lambda item: item[0].offsets[dim]):
        chunk = box[0]
        if chunk.offsets[dim] >= reached:
            groups.append([])
        groups[-1].append(box)
        reached = max(reached, chunk.offsets[dim] + chunk.sizes[dim])
    return groups
