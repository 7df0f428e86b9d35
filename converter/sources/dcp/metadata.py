"""`.metadata` of a torch distributed checkpoint: which tensors there are, in which pieces, and where each piece lies.

The file is a plain pickle of torch's dataclasses; here it is data (see `pickle_machine`). Classes are told by their
last name, fields by theirs, so what torch added or moved between 2.1 and 2.13 makes no difference.

Source: https://github.com/pytorch/pytorch/blob/v2.13.0/torch/distributed/checkpoint/metadata.py and filesystem.py
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converter.core.files.opening import Identity, identity, read_limited
from converter.core.formats.pickle_machine import MAX_PICKLE_BYTES, check_names, read_pickle
from converter.core.formats.pickle_values import Built, Global
from converter.core.formats.torch_file import MAX_ELEMENTS, dtype_named
from converter.core.tensors.dtypes import DType
from converter.diagnostic import Next
from converter.errors import Refused
from converter.text import show

METADATA = ".metadata"
MAX_DIMENSIONS = 64
_OF_MEGATRON = frozenset(
    f"megatron.core.dist_checkpointing.strategies.torch.{name}" for name in ("MCoreSavePlan", "MCoreMetadata")
)
"""Classes that megatron-core put into it until 0.15: torch's own, with a table more."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A box of a tensor: where it begins, and how large it is."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor over all ranks.

    Attributes:
        kind: the name of its element type; None for one that safetensors has no name for.
    """

    dtype: DType | None
    kind: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a piece lies: a file beside `.metadata`, and bytes in it."""

    file: str
    offset: int
    length: int


@dataclass(frozen=True)
class Metadata:
    """What `.metadata` says.

    Attributes:
        tensors: by key.
        blobs: keys of what is not a tensor.
        paths: keys as the path of dictionary keys that led there when it was saved.
        places: by key and offset.
        flattened: keys of optimizers' tensors that megatron-core saved as stretches of flat buffers.
    """

    folder: Path
    tensors: Mapping[str, Entry]
    blobs: tuple[str, ...]
    paths: Mapping[str, tuple[str, ...]]
    places: Mapping[tuple[str, tuple[int, ...]], Place]
    identity: Identity
    digest: str
    flattened: frozenset[str] = frozenset()

    def path(self, key: str) -> tuple[str, ...]:
        """The path of dictionary keys that a key was made of; the key itself where that isn't recorded."""
        return self.paths.get(key, (key,))

    def refuse(self, code: str, what: str, *, file: str = METADATA, next: Next | None = None) -> Refused:
        """A refusal about one of the folder's files."""
        return Refused(code, what, where=show(self.folder / file), next=next)


def read_metadata(folder: Path) -> Metadata:
    """What `.metadata` in a folder says.

    Raises:
        Refused: malformed (`pickle-malformed`, `dcp-malformed`), naming foreign code (`pickle-names`), or with pieces
            that were compressed on the way (`dcp-transformed`).
    """
    path = folder / METADATA
    raw = read_limited(path, limit=MAX_PICKLE_BYTES, root=folder)
    pickled = read_pickle(io.BytesIO(raw), where=str(path))
    check_names(pickled.names - _OF_MEGATRON, where=str(path))
    reader = _Reader(folder)
    state = reader.fields(pickled.value, "MCoreMetadata" if _kind(pickled.value) == "MCoreMetadata" else "Metadata")
    tensors, blobs = reader.entries(state.get("state_dict_metadata"))
    return Metadata(
        folder,
        tensors,
        blobs,
        reader.paths(state.get("planner_data")),
        reader.places(state.get("storage_data")),
        identity(path),
        hashlib.sha256(raw).hexdigest(),
        _flattened(state.get("mcore_data")),
    )


def _flattened(value: Any) -> frozenset[str]:
    """Keys with an original shape of their own in megatron-core's table."""
    if not isinstance(value, dict):
        return frozenset()
    return frozenset(
        key
        for key, fields in value.items()
        if isinstance(key, str) and isinstance(fields, dict) and "nd_reformulated_orig_global_shape" in fields
    )


class _Reader:
    """Inert objects of the pickle as values, each checked; whatever does not fit is a refusal."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._sizes: set[tuple[int, ...]] = set()

    def bad(self, what: str, code: str = "dcp-malformed") -> Refused:
        return Refused(code, what, where=show(self._folder / METADATA))

    def fields(self, item: Any, kind: str) -> Mapping[Any, Any]:
        """Fields of a dataclass, whose class has this last name."""
        if _kind(item) != kind or not isinstance(item.state, dict):
            raise self.bad(f"there is no {kind} where torch writes one")
        return item.state

    def entries(self, value: Any) -> tuple[dict[str, Entry], tuple[str, ...]]:
        if not isinstance(value, dict) or not all(isinstance(k, str) for k in value):
            raise self.bad("it has no table of tensors")
        tensors: dict[str, Entry] = {}
        blobs: list[str] = []
        for key, item in value.items():
            if _kind(item) == "BytesStorageMetadata":
                blobs.append(key)
            else:
                tensors[key] = self.entry(key, self.fields(item, "TensorStorageMetadata"))
        return tensors, tuple(blobs)

    def entry(self, key: str, state: Mapping[Any, Any]) -> Entry:
        shape = self.counts(state.get("size"), key)
        chunks = state.get("chunks")
        if not isinstance(chunks, list):
            raise self.bad(f"{show(key)} has no list of chunks")
        found = []
        for item in chunks:
            chunk = self.fields(item, "ChunkStorageMetadata")
            offsets, sizes = self.counts(chunk.get("offsets"), key), self.counts(chunk.get("sizes"), key)
            if not len(offsets) == len(sizes) == len(shape):
                raise self.bad(f"a chunk of {show(key)} has another number of dimensions than the tensor")
            if any(o + n > whole for o, n, whole in zip(offsets, sizes, shape, strict=True)):
                raise self.bad(f"a chunk of {show(key)} at {list(offsets)}, {list(sizes)} lies outside {list(shape)}")
            found.append(Chunk(offsets, sizes))
        kind = self.element(state.get("properties"), key)
        return Entry(dtype_named(kind), kind, shape, tuple(found))

    def element(self, properties: Any, key: str) -> str:
        """`bfloat16`: first of the tuple that TensorProperties pickles itself as, or a field."""
        state = properties.state if _kind(properties) == "TensorProperties" else None
        item = state[0] if isinstance(state, tuple) and state else None
        item = state.get("dtype") if isinstance(state, dict) else item
        if not isinstance(item, Global) or item.module != "torch":
            raise self.bad(f"{show(key)} has no element type")
        return item.name

    def counts(self, value: Any, key: str) -> tuple[int, ...]:
        items = value
        if isinstance(value, Built) and _kind(value) == "Size":
            items = value.args[0] if value.args else ()
            if isinstance(items, tuple) and set(map(type, items)) <= {int} and items in self._sizes:
                return items
        numel = 1
        if not isinstance(items, tuple | list) or len(items) > MAX_DIMENSIONS:
            raise self.bad(f"a shape of {show(key)} is none")
        for count in items:
            if type(count) is not int or not 0 <= count < MAX_ELEMENTS:
                raise self.bad(f"a shape of {show(key)} is none")
            numel *= max(count, 1)
        if numel >= MAX_ELEMENTS:
            raise self.bad(f"{show(key)} is larger than anything that could be stored")
        found = tuple(items)
        if isinstance(value, Built) and isinstance(items, tuple):
            self._sizes.add(found)
        return found

    def paths(self, value: Any) -> dict[str, tuple[str, ...]]:
        """The planner's table; one of another kind of planner is not used."""
        if not isinstance(value, dict):
            return {}
        return {
            key: tuple(map(str, path))
            for key, path in value.items()
            if isinstance(key, str) and _is_path(path) and ".".join(map(str, path)) == key
        }

    def places(self, value: Any) -> dict[tuple[str, tuple[int, ...]], Place]:
        if not isinstance(value, dict):
            raise self.bad("it has no table of places")
        found = {}
        for index, item in value.items():
            at = self.fields(index, "MetadataIndex")
            key, offset = at.get("fqn"), at.get("offset")
            if not isinstance(key, str):
                raise self.bad("a place in it is of no tensor")
            info = self.fields(item, "_StorageInfo")
            if info.get("transform_descriptors"):
                text = f"{show(key)} was transformed while it was saved ({show(info['transform_descriptors'])})"
                raise self.bad(f"{text}; such pieces are not read", "dcp-transformed")
            file, start, length = (info.get(k) for k in ("relative_path", "offset", "length"))
            if not isinstance(file, str) or "/" in file or file in ("", ".", "..") or "\0" in file:
                raise self.bad(f"a piece of {show(key)} lies in {show(file)}, which is not a file beside it")
            if not (type(start) is int and type(length) is int and start >= 0 and length > 0):
                raise self.bad(f"a piece of {show(key)} has no place in its file")
            offsets = () if offset is None else self.counts(offset, key)
            found[key, offsets] = Place(file, start, length)
        return found


def _kind(item: Any) -> str:
    """The last name of the class that a record is of."""
    function = item.function if isinstance(item, Built) else None
    return function.name.rpartition(".")[2] if isinstance(function, Global) else ""


def _is_path(path: Any) -> bool:
    return isinstance(path, tuple | list) and bool(path) and all(type(p) in (str, int) for p in path)
