"""A torch distributed checkpoint as files of a plan: `.distcp` files of tensors saved one by one, and `.metadata`.

    boxes = (Box((0, 0), upper, file_name(0)), Box((4, 0), lower, file_name(1)))
    shards, metadata = lay_out_distcp({"model.embed.weight": Distributed((8, 4), boxes)})
    Plan(shards, {METADATA: SideFile(content=metadata)}, ...)

Each tensor is copied or computed into its place as in any other file. Torch loads it on any number of ranks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from converter.core.formats import torch_zip_writer as torch_zip
from converter.core.formats.dcp_metadata import Chunk, Entry, KeyPath, Place, default_paths, metadata_pickle
from converter.core.formats.torch_tree import member
from converter.core.tensors.nodes import LazyTensor, narrow
from converter.core.writer import shard_plan
from converter.core.writer.shard_plan import ShardPlan, chunk_rows
from converter.errors import Refused
from converter.text import show

SUFFIX = ".distcp"


@dataclass(frozen=True, slots=True)
class Box:
    """A part of a tensor that begins at `offsets`, and the file that it is written to."""

    offsets: tuple[int, ...]
    tensor: LazyTensor
    file: str


@dataclass(frozen=True, slots=True)
class Distributed:
    """A tensor of a distributed checkpoint: its whole shape, and the boxes that it is saved in."""

    shape: tuple[int, ...]
    boxes: tuple[Box, ...]


@dataclass(frozen=True, slots=True)
class Blob:
    """An object that isn't a tensor, as torch.save writes it (`torch_zip_writer.tensorless`), and its file."""

    content: bytes
    file: str


def file_name(rank: int) -> str:
    """The name that torch gives to what a rank saves."""
    return f"__{rank}_0{SUFFIX}"


def boxed(tensor: LazyTensor, leading: int = 0) -> list[tuple[tuple[int, ...], LazyTensor]]:
    """A tensor in one box, or in one for each index of its leading dimensions: each with its offsets."""
    shape = tensor.info.shape
    found: list[tuple[tuple[int, ...], LazyTensor]] = [((), tensor)]
    for dim in range(leading):
        found = [((*at, n), narrow(part, dim, n, 1)) for at, part in found for n in range(shape[dim])]
    return [((*at, *[0] * (len(shape) - len(at))), part) for at, part in found]


def in_files(tensors: Mapping[str, list[tuple[tuple[int, ...], LazyTensor]]], limit: int) -> dict[str, Distributed]:
    """Boxes of each tensor laid into files in order, each of `limit` bytes at most, but for a single larger box."""
    number, size = 0, 0
    found = {}
    for key, parts in tensors.items():
        boxes = []
        for offsets, part in parts:
            nbytes = part.info.nbytes
            if size and size + nbytes > limit:
                number, size = number + 1, 0
            size += nbytes
            boxes.append(Box(offsets, part, file_name(number)))
        last, end = parts[-1]
        shape = tuple(at + n for at, n in zip(last, end.info.shape, strict=True))
        found[key] = Distributed(shape, tuple(boxes))
    return found


def lay_out_distcp(
    tensors: Mapping[str, Distributed],
    blobs: Mapping[str, Blob] | None = None,
    *,
    paths: Mapping[str, KeyPath] | None = None,
    folder: str = "",
) -> tuple[tuple[ShardPlan, ...], bytes]:
    """The `.distcp` files, and what `.metadata` beside them says.

    Args:
        tensors: by key, as the loader asks for them.
        blobs: objects by key.
        paths: of keys in the nest of dictionaries that was saved; None: they are all at the top.
        folder: below the output, where the files lie; `.metadata` goes there too.

    Raises:
        Refused: a type that torch doesn't have (`torch-dtype`); boxes of one tensor of several types, or that don't
            have as many elements as it has (`dcp-chunks`); a file without any tensor (`torch-tensor`).
    """
    blobs = blobs or {}
    homes: dict[str, list[tuple[str, Box]]] = {}
    for key, each in tensors.items():
        _expect_whole(key, each)
        for box in each.boxes:
            homes.setdefault(box.file, []).append((key, box))
    placed: dict[int, Place] = {}
    held: dict[str, Place] = {}
    shards = []
    for file, items in homes.items():
        own = {k: b.content for k, b in blobs.items() if b.file == file}
        shard, places, rest = _file(f"{folder}/{file}" if folder else file, items, own)
        shards.append(shard)
        placed |= {id(box): Place(file, *place) for (_, box), place in zip(items, places, strict=True)}
        held |= {k: Place(file, *place) for k, place in rest.items()}
    if lost := [k for k in blobs if k not in held]:
        raise Refused("torch-tensor", f"the file of {show(lost[0])} holds no tensor")
    entries = {
        key: Entry(
            each.boxes[0].tensor.info.dtype,
            each.shape,
            tuple(Chunk(b.offsets, b.tensor.info.shape, placed[id(b)]) for b in each.boxes),
        )
        for key, each in tensors.items()
    }
    return tuple(shards), metadata_pickle(entries, held, paths or default_paths([*tensors, *blobs]))


def _expect_whole(key: str, each: Distributed) -> None:
    """Boxes make up their tensor; that they don't overlap is the caller's to know."""
    counts = 1
    for length in each.shape:
        counts *= length
    kinds = {b.tensor.info.dtype for b in each.boxes}
    if len(kinds) != 1 or sum(b.tensor.info.numel for b in each.boxes) != counts:
        raise Refused("dcp-chunks", f"the boxes of {show(key)} don't make up a tensor of {list(each.shape)}")


def _file(
    file: str, items: list[tuple[str, Box]], blobs: Mapping[str, bytes]
) -> tuple[ShardPlan, list[tuple[int, int]], dict[str, tuple[int, int]]]:
    """A file's plan, and offset and length of each tensor's record and of each blob."""
    entries: list[shard_plan.Entry] = []
    places: list[tuple[int, int]] = []
    several = {key for key, count in Counter(key for key, _ in items).items() if count > 1}
    at, head = 0, b""
    for key, box in items:
        archive = torch_zip.archive(torch_zip.MEMBER, [("", box.tensor.info)], member(box.tensor.info))
        name = f"{key}{list(box.offsets)}" if key in several else key
        entries.append(shard_plan.Entry(name, box.tensor, at + archive.tensors[0].offset, chunk_rows(box.tensor)))
        places.append((at, archive.size))
        head = head or archive.head
        at += archive.size
    tail, rest = bytearray(), {}
    for key, content in blobs.items():
        rest[key] = (at + len(tail), len(content))
        tail += content
    shard = ShardPlan(file, head, tuple(entries), bytes(tail), at + len(tail), is_members=True)
    return shard, places, rest
