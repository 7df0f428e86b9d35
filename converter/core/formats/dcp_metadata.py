"""`.metadata` of torch's distributed checkpoints, written: which tensors there are, and where each chunk of them lies.

It is a plain pickle of torch's own classes, built here as a tree of names: no torch is needed. Loading matches what it
says with what each rank holds, so that any number of ranks can load it.

Source: https://github.com/pytorch/pytorch/blob/v2.13.0/torch/distributed/checkpoint/metadata.py and filesystem.py
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from converter.core.formats import torch_tree
from converter.core.formats.pickle_values import Built, Global
from converter.core.formats.pickle_writer import write_pickle
from converter.core.tensors.dtypes import DType

METADATA = ".metadata"

_MODULE = "torch.distributed.checkpoint.metadata"
_VERSION = "1.0.0"
"""Source: `CURRENT_DCP_VERSION` in filesystem.py. Before 2.7 torch wrote none, and has no use for it."""


@dataclass(frozen=True, slots=True)
class Place:
    """Bytes of a file beside `.metadata`: a whole file of torch.save."""

    file: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """A box of a tensor: where it begins, how large it is, and where its bytes lie."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    place: Place


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor over all files; its chunks make it up without gaps."""

    dtype: DType
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


KeyPath = tuple[str | int, ...]
"""Keys of the nested dictionaries, and indexes of lists, that lead to an entry."""


def metadata_pickle(tensors: Mapping[str, Entry], blobs: Mapping[str, Place], paths: Mapping[str, KeyPath]) -> bytes:
    """The file's content.

    Args:
        tensors, blobs: by key; a blob is an object that was saved by itself.
        paths: of keys; loaders that build the nest of dictionaries again take them from there.
    """
    # One object for all tensors of a type is what torch writes too where tensors share their properties.
    properties = {dtype: _properties(dtype) for dtype in {e.dtype for e in tensors.values()}}
    listed: dict[str, Any] = {k: _made("BytesStorageMetadata") for k in blobs}
    places: dict[Any, Any] = {_made("MetadataIndex", fqn=k, index=None): _info(place) for k, place in blobs.items()}
    for key, entry in tensors.items():
        listed[key] = _made(
            "TensorStorageMetadata",
            properties=properties[entry.dtype],
            size=torch_tree.size(entry.shape),
            chunks=[_chunk(c) for c in entry.chunks],
        )
        for number, chunk in enumerate(entry.chunks):
            index = _made("MetadataIndex", fqn=key, index=number, offset=torch_tree.size(chunk.offsets))
            places[index] = _info(chunk.place)
    tree = _made(
        "Metadata",
        state_dict_metadata=listed,
        planner_data={k: paths[k] for k in listed},
        storage_data=places,
        storage_meta=None,
        version=_VERSION,
    )
    return write_pickle(tree, reference=lambda identity: identity)


def _made(name: str, /, **fields: Any) -> Built:
    """An object of one of torch's dataclasses."""
    return _object(Global(_MODULE, name), fields or None)


def _object(kind: Global, state: Any) -> Built:
    made = Built(kind, (), is_new=True)
    made.state = state
    return made


def _info(place: Place) -> Built:
    fields = {"relative_path": place.file, "offset": place.offset, "length": place.length}
    return _object(Global("torch.distributed.checkpoint.filesystem", "_StorageInfo"), fields)


def _chunk(chunk: Chunk) -> Built:
    return _made("ChunkStorageMetadata", offsets=torch_tree.size(chunk.offsets), sizes=torch_tree.size(chunk.sizes))


def _properties(dtype: DType) -> Built:
    """A dense contiguous tensor without gradient: it pickles itself as a tuple."""
    layout = Built(Global("torch.serialization", "_get_layout"), ("torch.strided",))
    contiguous = Built(Global(_MODULE, "_MEM_FORMAT_ENCODING"), (0,))
    return _object(
        Global(_MODULE, "TensorProperties"), (Global("torch", dtype.torch_name), layout, False, contiguous, False)
    )


def default_paths(keys: Sequence[str], under: KeyPath = ()) -> dict[str, KeyPath]:
    """Paths of keys below some dictionaries: `app.model.norm.weight` below `app`, `model` is their `norm.weight`."""
    start = "".join(f"{part}." for part in under)
    return {k: (*under, k.removeprefix(start)) for k in keys}
