"""The plan: which bytes go where in which file, worked out from headers alone. Pure, and a value: JSON.

A shard plan is head bytes, entries at offsets and tail bytes, so that other containers than safetensors can be
written. What may change between two runs of the same work (`--jobs`, `--memory`) is no part of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from converter import kernel_specs
from converter.accounting import checks_of
from converter.checkpoint import Checkpoint, RecordCheck, SideFile
from converter.context import Context
from converter.errors import Refused
from converter.files import Identity
from converter.safetensors_io import build_header, build_index
from converter.tensor_bytes import ByteRun, byte_runs, leaves, reads
from converter.tensor_json import from_json, to_json
from converter.tensors import Apply, Cast, Filled, LazyTensor, Narrow, Strided, is_separable

PLAN_VERSION = 1
"""Raised whenever the same inputs may give another plan or other bytes; part of the fingerprint."""

CHUNK_ELEMENTS = 1 << 19
"""Elements of a row chunk, about: 2 MiB in fp32. Smaller ones fit the L2 cache better, but what Python does for each
chunk (0.8 ms under its lock) then keeps a second worker from helping; larger ones only take more memory (measured)."""

ROW_MULTIPLE = 64
"""Chunk heights are multiples of this; other heights change the bits of fp32 matrix products (measured, torch 2.13)."""

DEFAULT_MAX_SHARD_SIZE = 5_000_000_000
"""Source: transformers `save_pretrained`, https://huggingface.co/docs/transformers/v4.57.0/big_models#sharded-checkpoints."""

PAGE = 4096
"""Data that keeps its offset modulo a filesystem block can be cloned rather than copied."""

Layout = Literal["auto", "preserve", "pack"]
CONFIG_FILE = "config.json"
WEIGHTS_STEM = "model"
ADAPTER_CONFIG_FILE = "adapter_config.json"
ADAPTER_STEM = "adapter_model"
"""PEFT reads one file of this name, whatever its size."""

RECEIPT_FILE = "rlhf-convert.json"


@dataclass(frozen=True)
class Entry:
    """One tensor of a shard: `length` bytes at `offset` of the file, computed in chunks of `chunk_rows` rows."""

    name: str
    tensor: LazyTensor
    offset: int
    chunk_rows: int

    @property
    def length(self) -> int:
        """Bytes of the tensor."""
        return self.tensor.info.nbytes

    @cached_property
    def runs(self) -> tuple[ByteRun, ...] | None:
        """Where the bytes lie as they are; None where they are computed."""
        return byte_runs(self.tensor)

    @cached_property
    def extents(self) -> list[tuple[int, int]]:
        """Offset in the file and bytes of each chunk of a computed entry."""
        shape = self.tensor.info.shape
        row = self.length // (shape[0] if shape else 1) if self.length else 0
        return [(self.offset + start * row, (stop - start) * row) for start, stop in self.chunks()]

    def chunks(self) -> list[tuple[int, int]]:
        """Row ranges `[start, stop)` in which a computed entry is evaluated; the remainder joins the last one."""
        shape = self.tensor.info.shape
        count = shape[0] if shape else 1
        height = self.chunk_rows
        edges = [*range(0, max(count - height, 0) + 1, height)] or [0]
        return [(a, b) for a, b in zip(edges, [*edges[1:], count], strict=True) if a < b]


@dataclass(frozen=True)
class ShardPlan:
    """One output file: `head`, then entries at their offsets, then `tail`; `size` bytes in all."""

    file: str
    head: bytes
    entries: tuple[Entry, ...]
    tail: bytes
    size: int


@dataclass(frozen=True)
class Plan:
    """Everything that a run will write, and everything it will read.

    Attributes:
        shards: the weight files.
        side_files: config, index, tokenizer and the like; the receipt is made by the run.
        inputs: every file that is read, absolute, with its identity when it was planned.
        dropped: tensors left out on request, with the reason.
        provenance: what made this plan (recipe, inputs by name, notes, consents): JSON values, no absolute path.
        evidence: what was read of values while planning.
        checks: checksums of the stretches of the inputs that are read; compared before anything is published.
    """

    shards: tuple[ShardPlan, ...]
    side_files: Mapping[str, SideFile]
    inputs: Mapping[str, Identity]
    dropped: Mapping[str, str]
    provenance: Mapping[str, Any]
    evidence: tuple[str, ...] = ()
    checks: tuple[RecordCheck, ...] = ()

    @property
    def entries(self) -> list[Entry]:
        """Every tensor, in file order."""
        return [e for shard in self.shards for e in shard.entries]

    @property
    def total_bytes(self) -> int:
        """Bytes of all weight files."""
        return sum(s.size for s in self.shards)

    @cached_property
    def counts(self) -> dict[str, int]:
        """How many tensors are `copied` by the operating system, `computed`, `filled` with a value, `dropped`."""
        kinds = [_kind(e) for e in self.entries]
        return {k: kinds.count(k) for k in ("copied", "computed", "filled")} | {"dropped": len(self.dropped)}

    @cached_property
    def summary(self) -> dict[str, str]:
        """What the plan consists of, part by part; two plans are the same work where all parts are equal."""
        parts = {"plan version": str(PLAN_VERSION), "recipe": _canonical(self.provenance)}
        parts |= {f"input {path}": _canonical(i.to_json()) for path, i in sorted(self.inputs.items())}
        parts |= {f"shard {s.file}": _digest(_shard_to_json(s)) for s in self.shards}
        parts |= {f"file {n}": _digest(_side_to_json(f)) for n, f in sorted(self.side_files.items())}
        return parts | {"evidence": _digest(list(self.evidence)), "dropped": _digest(dict(self.dropped))}

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over all parts, hexadecimal."""
        return _digest(self.summary)

    def to_json(self) -> dict[str, Any]:
        """The whole plan as JSON values."""
        return {
            "version": PLAN_VERSION,
            "shards": [_shard_to_json(s) for s in self.shards],
            "side_files": {n: _side_to_json(f) for n, f in self.side_files.items()},
            "inputs": {p: i.to_json() for p, i in self.inputs.items()},
            "dropped": dict(self.dropped),
            "provenance": dict(self.provenance),
            "evidence": list(self.evidence),
            "checks": [[c.file, c.offset, c.length, c.crc] for c in self.checks],
        }

    @classmethod
    def from_json(cls, obj: Mapping[str, Any]) -> Plan:
        """The plan that `to_json` wrote, built through the same constructors.

        Raises:
            Refused: written by another version, or malformed (`plan-json`).
        """
        if obj.get("version") != PLAN_VERSION:
            raise Refused("plan-json", "the plan was written by another version", expected=str(PLAN_VERSION))
        return cls(
            tuple(_shard_from_json(s) for s in obj["shards"]),
            {n: _side_from_json(f) for n, f in obj["side_files"].items()},
            {p: Identity.from_json(i) for p, i in obj["inputs"].items()},
            obj["dropped"],
            obj["provenance"],
            tuple(obj["evidence"]),
            tuple(RecordCheck(*c) for c in obj["checks"]),
        )


def _kind(entry: Entry) -> str:
    if isinstance(entry.tensor, Filled) and entry.tensor.info.numel:
        return "filled"
    return "copied" if entry.runs is not None else "computed"


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def _digest(value: Any) -> str:
    return hashlib.sha256(_canonical(value).encode()).hexdigest()


def _shard_to_json(shard: ShardPlan) -> dict[str, Any]:
    entries = [
        {"name": e.name, "tensor": to_json(e.tensor), "offset": e.offset, "chunk_rows": e.chunk_rows}
        for e in shard.entries
    ]
    return {
        "file": shard.file,
        "head": shard.head.hex(),
        "entries": entries,
        "tail": shard.tail.hex(),
        "size": shard.size,
    }


def _shard_from_json(obj: Mapping[str, Any]) -> ShardPlan:
    entries = tuple(Entry(e["name"], from_json(e["tensor"]), e["offset"], e["chunk_rows"]) for e in obj["entries"])
    return ShardPlan(obj["file"], bytes.fromhex(obj["head"]), entries, bytes.fromhex(obj["tail"]), obj["size"])


def _side_to_json(file: SideFile) -> dict[str, Any]:
    return {"source": file.source, "content": None if file.content is None else file.content.hex()}


def _side_from_json(obj: Mapping[str, Any]) -> SideFile:
    return SideFile(obj["source"], None if obj["content"] is None else bytes.fromhex(obj["content"]))


def chunk_rows(tensor: LazyTensor) -> int:
    """The height of a chunk: a fixed function of the tensor's shape, whatever the memory or the number of jobs."""
    shape = tensor.info.shape
    if not shape or not is_separable(tensor):
        return max(shape[0] if shape else 1, 1)
    width = max(tensor.info.numel // max(shape[0], 1), 1)
    return max(CHUNK_ELEMENTS // width // ROW_MULTIPLE, 1) * ROW_MULTIPLE


def make_plan(
    checkpoint: Checkpoint,
    *,
    context: Context,
    max_shard_size: int | None = None,
    layout: Layout = "auto",
    provenance: Mapping[str, Any] | None = None,
) -> Plan:
    """Lay a checkpoint out in safetensors files. Reads no tensor.

    Args:
        max_shard_size: bytes of tensors that one file may hold, but for a single larger tensor; None: 5 GB for files
            that are laid out anew, and no limit for files that keep their tensors.
        layout: `preserve` keeps each tensor in its file and order, added ones join the last file; `pack` fills files in
            order; `auto` is `preserve` where the source has files and no size is given.

    Raises:
        Refused: there is nothing to write (`no-tensors`).
    """
    if not checkpoint.tensors:
        raise Refused("no-tensors", "there is no tensor to write", where=checkpoint.origin.asked)
    adapter = is_adapter(checkpoint)
    keep = layout == "preserve" or (layout == "auto" and max_shard_size is None and bool(checkpoint.shards))
    limit = max_shard_size or DEFAULT_MAX_SHARD_SIZE
    groups = _preserved(checkpoint, max_shard_size) if keep else _packed(list(checkpoint.tensors), checkpoint, limit)
    if adapter:
        groups = [list(checkpoint.tensors)]
    count = len(groups)
    stem = ADAPTER_STEM if adapter else WEIGHTS_STEM
    shards = tuple(
        _lay_out(_shard_name(stem, i, count), [(n, checkpoint.tensors[n]) for n in names], checkpoint.metadata, keep)
        for i, names in enumerate(groups, 1)
    )
    config_file = ADAPTER_CONFIG_FILE if adapter else CONFIG_FILE
    files = dict(checkpoint.side_files) | {config_file: SideFile(content=config_content(checkpoint))}
    if count > 1:
        weight_map = {e.name: s.file for s in shards for e in s.entries}
        files[f"{WEIGHTS_STEM}.safetensors.index.json"] = SideFile(
            content=build_index(weight_map, checkpoint.total_bytes)
        )
    made_by = dict(provenance or {})
    made_by |= {"consents": dict(context.consents), "notes": [[n.severity, n.code, n.text] for n in context.notes]}
    checks = checks_of(checkpoint.tensors.values(), checkpoint.checks)
    return Plan(shards, files, checkpoint.inputs, checkpoint.dropped, made_by, tuple(context.evidence), checks)


def is_adapter(checkpoint: Checkpoint) -> bool:
    """True where the files get the names that PEFT looks for."""
    return checkpoint.origin.kind == "adapter"


def config_content(checkpoint: Checkpoint) -> bytes:
    """`config.json` as it will be written: verbatim where nothing changed, else as transformers formats it."""
    if checkpoint.config_bytes is not None:
        return checkpoint.config_bytes
    return (json.dumps(checkpoint.config, indent=2, sort_keys=True) + "\n").encode()


def _shard_name(stem: str, number: int, count: int) -> str:
    return f"{stem}.safetensors" if count == 1 else f"{stem}-{number:05d}-of-{count:05d}.safetensors"


def _packed(names: Sequence[str], checkpoint: Checkpoint, limit: int) -> list[list[str]]:
    groups: list[list[str]] = [[]]
    size = 0
    for name in names:
        nbytes = checkpoint.tensors[name].info.nbytes
        if groups[-1] and size + nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += nbytes
    return groups


def _preserved(checkpoint: Checkpoint, limit: int | None) -> list[list[str]]:
    """Files as they were, emptied ones gone; added tensors at the end of the last, or in new ones past the limit."""
    groups: dict[str, list[str]] = {}
    added: list[str] = []
    for name in checkpoint.tensors:
        file = checkpoint.shards.get(name)
        if file is None:
            added.append(name)
        else:
            groups.setdefault(file, []).append(name)
    kept = list(groups.values()) or [[]]
    ceiling = limit or DEFAULT_MAX_SHARD_SIZE
    size = sum(checkpoint.tensors[n].info.nbytes for n in kept[-1])
    for name in added:
        nbytes = checkpoint.tensors[name].info.nbytes
        if kept[-1] and size + nbytes > ceiling and nbytes > 0:
            kept.append([])
            size = 0
        kept[-1].append(name)
        size += nbytes
    return kept


def _lay_out(
    file: str, tensors: Sequence[tuple[str, LazyTensor]], metadata: Mapping[str, str], keep: bool
) -> ShardPlan:
    modulo = _source_modulo(tensors) if keep else None
    head = build_header([(n, t.info) for n, t in tensors], metadata, data_start_mod=modulo)
    entries: list[Entry] = []
    offset = len(head)
    for name, tensor in tensors:
        entries.append(Entry(name, tensor, offset, chunk_rows(tensor)))
        offset += tensor.info.nbytes
    return ShardPlan(file, head, tuple(entries), b"", offset)


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
        case Cast() | Narrow():
            return chunk_cost(tensor.source) + tensor.info.nbytes
        case Strided():
            return sum(r.length for r in reads(tensor)) + tensor.info.nbytes
        case _:
            return tensor.info.nbytes + max((leaf.info.nbytes for leaf in leaves(tensor)), default=0)
