"""One file of a plan: its tensors at their offsets, the chunks in which they are computed, and what that takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from converter.core.formats import torch_zip_writer as torch_zip
from converter.core.formats.safetensors_io import Header, build_header
from converter.core.formats.torch_tree import member
from converter.core.tensors import as_json as tensor_json
from converter.core.tensors import kernel_specs
from converter.core.tensors.byte_runs import ByteRun, byte_runs, leaves, reads
from converter.core.tensors.dtypes import DType
from converter.core.tensors.nodes import Apply, Cast, Concat, Filled, LazyTensor, Narrow, Reshape, Strided, is_separable

CHUNK_ELEMENTS = 1 << 19
"""Elements of a row chunk, about: 2 MiB in fp32. Smaller ones fit the L2 cache better, but what Python does for each
chunk (0.8 ms under its lock) then keeps a second worker from helping; larger ones only take more memory (measured)."""

ROW_MULTIPLE = 64
"""Chunk heights are multiples of this; other heights change the bits of fp32 matrix products (measured, torch 2.13)."""

PAGE = 4096
"""Data that keeps its offset modulo a filesystem block can be cloned rather than copied."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a shard: `length` bytes at `offset` of the file, computed in chunks of `chunk_rows` rows.

    Attributes:
        is_storage: bytes under no name, of which zeros are left as a new file has them.
    """

    name: str
    tensor: LazyTensor
    offset: int
    chunk_rows: int
    is_storage: bool = False

    @property
    def length(self) -> int:
        """Bytes of the tensor."""
        return self.tensor.info.nbytes

    @cached_property
    def runs(self) -> tuple[ByteRun, ...] | None:
        """Where the bytes lie as they are; None where they are computed. Of a head of zeros they lie nowhere."""
        return byte_runs(self.tensor, zeros=self.is_storage or isinstance(self.tensor, Filled))

    @cached_property
    def matrix(self) -> LazyTensor:
        """The tensor with the rows that chunks are made of: of a computed stack of matrices, the rows of all."""
        return as_matrix(self.tensor)

    @cached_property
    def extents(self) -> list[tuple[int, int]]:
        """Offset in the file and bytes of each chunk of a computed entry."""
        shape = self.matrix.info.shape
        row = self.length // (shape[0] if shape else 1) if self.length else 0
        return [(self.offset + start * row, (stop - start) * row) for start, stop in self.chunks()]

    def chunks(self) -> list[tuple[int, int]]:
        """Row ranges `[start, stop)` in which a computed entry is evaluated; the remainder joins the last one."""
        shape = self.matrix.info.shape
        count = shape[0] if shape else 1
        height = self.chunk_rows
        edges = [*range(0, max(count - height, 0) + 1, height)] or [0]
        return [(a, b) for a, b in zip(edges, [*edges[1:], count], strict=True) if a < b]


@dataclass(frozen=True)
class ShardPlan:
    """One output file: `header`, then entries at their offsets, then `tail`; `size` bytes in all.

    A torch file has more between and after its entries, which depends on their checksums and is written last
    (`converter.core.formats.torch_zip_writer`).

    Attributes:
        link: a file of the source that is this one, byte by byte; the output gets a symbolic link to it.
        pickled: what a torch file says of its storages, where it holds more than tensors by name.
        is_members: every tensor is a torch file of its own, one after the other (see `distcp`).
    """

    file: str
    header: bytes
    entries: tuple[Entry, ...]
    tail: bytes
    size: int
    link: str | None = None
    pickled: bytes | None = None
    is_members: bool = False

    @property
    def is_torch(self) -> bool:
        """True for torch's zip format, false for safetensors."""
        return not self.file.endswith(".safetensors")

    @property
    def archives(self) -> Iterator[tuple[int, torch_zip.Archive, slice]]:
        """Where each torch file begins that this file consists of, its records, and which of the entries are in it."""
        if not self.is_members:
            named = [(e.name, e.tensor.info) for e in self.entries]
            yield 0, torch_zip.archive(self.file, named, self.pickled), slice(len(self.entries))
            return
        start = 0
        for number, entry in enumerate(self.entries):
            info = entry.tensor.info
            archive = torch_zip.archive(torch_zip.MEMBER, [("", info)], member(info))
            yield start, archive, slice(number, number + 1)
            start += archive.size


def as_matrix(tensor: LazyTensor) -> LazyTensor:
    """A stack of matrices that is put together row by row as one matrix, so that a chunk may be a part of one of them;
    any other tensor as it is.
    """
    if isinstance(tensor, Reshape) and isinstance(tensor.source, Concat):
        inner, outer = tensor.source.info.shape, tensor.shape
        if tensor.source.dim == 0 and len(inner) == 2 and len(outer) > 2 and inner[1] == outer[-1]:
            return tensor.source
    return tensor


def chunk_rows(tensor: LazyTensor) -> int:
    """The height of a chunk: a fixed function of the tensor's shape, whatever the memory or the number of jobs.

    A matrix of a stack is cut at multiples of `ROW_MULTIPLE` of its own rows, or not at all.
    """
    matrix = as_matrix(tensor)
    shape = matrix.info.shape
    if not shape or not is_separable(matrix):
        return max(shape[0] if shape else 1, 1)
    width = max(matrix.info.numel // max(shape[0], 1), 1)
    unit = ROW_MULTIPLE if len(shape) < 3 else 1  # a stack: each expert is a product of its own
    if matrix is not tensor and tensor.info.shape[-2] % unit:
        unit = tensor.info.shape[-2]
    return max(CHUNK_ELEMENTS // width // unit, 1) * unit


def lay_out(
    file: str, tensors: Sequence[tuple[str, LazyTensor]], metadata: Mapping[str, str], *, keep: bool
) -> ShardPlan:
    """A file with these tensors, in the container that its suffix names.

    Args:
        metadata: `__metadata__` of safetensors; torch's files have none.
        keep: place the data of safetensors where blocks of the source can be cloned.

    Raises:
        Refused: a type that the container can't hold (`torch-dtype`), too long a header (`header-too-large`).
    """
    if not file.endswith(".safetensors"):
        archive = torch_zip.archive(file, [(n, t.info) for n, t in tensors])
        placed = [Entry(n, t, r.offset, chunk_rows(t)) for (n, t), r in zip(tensors, archive.tensors, strict=True)]
        return ShardPlan(file, archive.head, tuple(placed), b"", archive.size)
    modulo = _source_modulo(tensors) if keep else None
    header = build_header([(n, t.info) for n, t in tensors], metadata, data_start_mod=modulo)
    entries: list[Entry] = []
    offset = len(header)
    for name, tensor in tensors:
        entries.append(Entry(name, tensor, offset, chunk_rows(tensor)))
        offset += tensor.info.nbytes
    return ShardPlan(file, header, tuple(entries), b"", offset)


def as_link(file: str, tensors: Sequence[tuple[str, LazyTensor]], headers: Mapping[str, Header]) -> ShardPlan | None:
    """A file with these tensors as a link to one of the source's that holds them all, and nothing else.

    Args:
        headers: of the files that may be linked, by absolute path.
    """
    sources = {r.file for _, t in tensors for r in byte_runs(t) or ()}
    source = next(iter(sources)) if len(sources) == 1 else ""
    header = headers.get(source)
    if header is None or not file.endswith(".safetensors") or header.metadata.get("format") != "pt":
        return None
    starts = {n: header.data_start + begin for n, (_, begin, _) in header.tensors.items()}
    held = {n: (info, starts[n] if begin < end else 0) for n, (info, begin, end) in header.tensors.items()}
    if held != {n: (t.info, _start(t)) for n, t in tensors}:
        return None
    entries = [Entry(n, t, starts[n], chunk_rows(t)) for n, t in tensors]
    return ShardPlan(file, header.raw, tuple(entries), b"", header.file_size, link=source)


def _start(tensor: LazyTensor) -> int | None:
    """Where a tensor's bytes begin that lie in one piece; 0 for one without any."""
    runs = byte_runs(tensor)
    if runs is None or len(runs) > 1:
        return None
    return runs[0].offset if runs else 0


def _source_modulo(tensors: Sequence[tuple[str, LazyTensor]]) -> tuple[int, int] | None:
    """The data's start modulo a page that lets the largest copied run keep its alignment and so be cloned."""
    position, best, modulo = 0, 0, None
    for _, tensor in tensors:
        runs = byte_runs(tensor)
        if runs and runs[0].length > best:
            best, modulo = runs[0].length, (runs[0].offset - position) % PAGE
        position += tensor.info.nbytes
    return None if modulo is None else (modulo, PAGE)


def chunk_cost(tensor: LazyTensor) -> int:
    """Bytes that evaluating `tensor` (a chunk, or all of one that can't be cut) holds at once, about."""
    match tensor:
        case Apply():
            infos = tuple(i.info for i in tensor.inputs)
            spec = kernel_specs.find(tensor.kernel)
            held = sum(chunk_cost(i) for i in tensor.inputs)
            return held + spec.workspace(infos, dict(tensor.params)) + tensor.info.nbytes
        case Cast() if tensor.dtype is DType.F16 and tensor.source.info.dtype is DType.BF16:
            return chunk_cost(tensor.source) + 3 * tensor.info.nbytes  # by way of fp32
        case Cast() | Narrow():
            return chunk_cost(tensor.source) + tensor.info.nbytes
        case Concat() if any(isinstance(p, Apply | Reshape) for p in tensor.parts):
            return 2 * tensor.info.nbytes + max(chunk_cost(p) - p.info.nbytes for p in tensor.parts)
        case Strided():
            return sum(r.length for r in reads(tensor)) + tensor.info.nbytes
        case _:
            return tensor.info.nbytes + max((leaf.info.nbytes for leaf in leaves(tensor)), default=0)


def to_json(shard: ShardPlan) -> dict[str, Any]:
    """A shard's plan as JSON values."""
    entries = [
        {
            "name": e.name,
            "tensor": tensor_json.to_json(e.tensor),
            "offset": e.offset,
            "chunk_rows": e.chunk_rows,
            **({"is_storage": True} if e.is_storage else {}),
        }
        for e in shard.entries
    ]
    return {
        "file": shard.file,
        "head": shard.header.hex(),
        "entries": entries,
        "tail": shard.tail.hex(),
        "size": shard.size,
        **({} if shard.link is None else {"link": shard.link}),
        **({} if shard.pickled is None else {"pickled": shard.pickled.hex()}),
        **({"is_members": True} if shard.is_members else {}),
    }


def from_json(obj: Mapping[str, Any]) -> ShardPlan:
    """The plan that `to_json` wrote."""
    entries = tuple(
        Entry(e["name"], tensor_json.from_json(e["tensor"]), e["offset"], e["chunk_rows"], e.get("is_storage", False))
        for e in obj["entries"]
    )
    return ShardPlan(
        obj["file"],
        bytes.fromhex(obj["head"]),
        entries,
        bytes.fromhex(obj["tail"]),
        obj["size"],
        link=obj.get("link"),
        pickled=None if obj.get("pickled") is None else bytes.fromhex(obj["pickled"]),
        is_members=obj.get("is_members", False),
    )
