"""The plan: which bytes go where in which file, worked out from headers alone. Pure, and a value: JSON.

Weights go to safetensors or, where a loader reads nothing else, to torch's zip format. What may change between two runs
of the same work (`--jobs`, `--memory`) is not part of it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from converter.core.checkpoint import ADAPTER, DELTA, STATE, Checkpoint, RecordCheck, SideFile
from converter.core.context import Context
from converter.core.files.names import ADAPTER_CONFIG, ADAPTER_STEM, DELTA_CONFIG, MODEL_CONFIG, RECEIPT
from converter.core.files.opening import Identity
from converter.core.formats.dcp_metadata import METADATA, default_paths
from converter.core.formats.safetensors_io import Header, build_index
from converter.core.tensors.nodes import Filled, LazyTensor
from converter.core.writer import shard_plan
from converter.core.writer.accounting import checks_of
from converter.core.writer.distcp import boxed, in_files, lay_out_distcp
from converter.core.writer.shard_plan import Entry, ShardPlan, as_link, lay_out
from converter.core.writer.torch_trees import lay_out_tree
from converter.errors import Refused
from converter.text import fold, format_size, show

PLAN_VERSION = 2
"""Raised whenever the same inputs may give another plan or other bytes; part of the fingerprint."""

DEFAULT_MAX_SHARD_SIZE = 5_000_000_000
"""Source: transformers `save_pretrained`, https://huggingface.co/docs/transformers/v4.57.0/big_models#sharded-checkpoints."""

Layout = Literal["auto", "preserve", "pack"]
WEIGHTS_STEM = "model"
TORCH_STEM = "pytorch_model"

_WEIGHT_FILE = re.compile(r"\w[\w.-]{0,199}\.(?:safetensors|bin|pt)", re.ASCII)
_FOLDER = re.compile(r"\w[\w-]{0,99}", re.ASCII)
"""Beginning with neither a dot nor a dash: no hidden file, no way up, no option."""


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
        device: where kernels compute, as `cuda:0`; None: on the CPU. The provenance has its model, the same work does
            not depend on its number.
    """

    shards: tuple[ShardPlan, ...]
    side_files: Mapping[str, SideFile]
    inputs: Mapping[str, Identity]
    dropped: Mapping[str, str]
    provenance: Mapping[str, Any]
    evidence: tuple[str, ...] = ()
    checks: tuple[RecordCheck, ...] = ()
    device: str | None = None

    @property
    def entries(self) -> list[Entry]:
        """Every tensor, in file order."""
        return [e for shard in self.shards for e in shard.entries]

    @property
    def total_bytes(self) -> int:
        """Bytes of all weight files that are written, and not linked."""
        return sum(s.size for s in self.written)

    @property
    def written(self) -> tuple[ShardPlan, ...]:
        """The weight files but for those that are links."""
        return tuple(s for s in self.shards if s.link is None)

    @property
    def linked(self) -> tuple[ShardPlan, ...]:
        """The weight files that are links to files of the source."""
        return tuple(s for s in self.shards if s.link is not None)

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
        parts |= {f"shard {s.file}": _digest(shard_plan.to_json(s)) for s in self.shards}
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
            "shards": [shard_plan.to_json(s) for s in self.shards],
            "side_files": {n: _side_to_json(f) for n, f in self.side_files.items()},
            "inputs": {p: i.to_json() for p, i in self.inputs.items()},
            "dropped": dict(self.dropped),
            "provenance": dict(self.provenance),
            "evidence": list(self.evidence),
            "checks": [[c.file, c.offset, c.length, c.crc] for c in self.checks],
            **({} if self.device is None else {"device": self.device}),
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
            tuple(shard_plan.from_json(s) for s in obj["shards"]),
            {n: _side_from_json(f) for n, f in obj["side_files"].items()},
            {p: Identity.from_json(i) for p, i in obj["inputs"].items()},
            obj["dropped"],
            obj["provenance"],
            tuple(obj["evidence"]),
            tuple(RecordCheck(*c) for c in obj["checks"]),
            obj.get("device"),
        )


def _kind(entry: Entry) -> str:
    if isinstance(entry.tensor, Filled) and entry.tensor.info.numel:
        return "filled"
    return "copied" if entry.runs is not None else "computed"


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def _digest(value: Any) -> str:
    return hashlib.sha256(_canonical(value).encode()).hexdigest()


def _side_to_json(file: SideFile) -> dict[str, Any]:
    return {"source": file.source, "content": None if file.content is None else file.content.hex()}


def _side_from_json(obj: Mapping[str, Any]) -> SideFile:
    return SideFile(obj["source"], None if obj["content"] is None else bytes.fromhex(obj["content"]))


def make_plan(
    checkpoint: Checkpoint,
    *,
    context: Context,
    max_shard_size: int | None = None,
    layout: Layout = "auto",
    provenance: Mapping[str, Any] | None = None,
    linkable: Mapping[str, Header] | None = None,
) -> Plan:
    """Lay a checkpoint out in files: its tensors, then each file beside them. Reads no tensor.

    Args:
        max_shard_size: bytes of tensors that one file may hold, but for a single larger tensor; None: 5 GB for files
            that are laid out anew, and no limit for files that keep their tensors.
        layout: `preserve` keeps each tensor in its file and order, added ones join the last file; `pack` fills files in
            order; `auto` is `preserve` where the source has files and no size is given.
        linkable: headers of files, by path, that an output file with the same content may be a link to.

    Raises:
        Refused: there is nothing to write (`no-tensors`); the container can't hold a tensor's type (`torch-dtype`); a
            loader needs one file, and smaller ones were asked for (`one-file`); a file's name is a path, or taken
            (`file-name`).
    """
    if not checkpoint.tensors:
        raise Refused("no-tensors", "there is no tensor to write", where=checkpoint.origin.asked)
    config_file = {ADAPTER: ADAPTER_CONFIG, DELTA: DELTA_CONFIG}.get(checkpoint.origin.kind, MODEL_CONFIG)
    files = dict(checkpoint.side_files)
    if checkpoint.origin.kind != STATE:
        files[config_file] = SideFile(content=config_content(checkpoint))
    if checkpoint.container == "distcp":
        place = f"{checkpoint.subfolder}/" if checkpoint.subfolder else ""
        shards, files[place + METADATA] = _distributed(checkpoint, max_shard_size)
    elif checkpoint.container == "trees":
        shards = tuple(lay_out_tree(file, tree) for file, tree in checkpoint.trees.items())
    else:
        keep = layout == "preserve" or (layout == "auto" and max_shard_size is None and bool(checkpoint.shards))
        shards, index = _files(checkpoint, keep, max_shard_size, linkable or {})
        files |= index
    _expect_plain_names(checkpoint, [s.file for s in shards], files)
    made_by = dict(provenance or {})
    made_by |= {"consents": dict(context.consents), "notes": [[n.severity, n.code, n.text] for n in context.notes]}
    checks = checks_of(checkpoint.all_tensors(), checkpoint.checks)
    return Plan(shards, files, checkpoint.inputs, checkpoint.dropped, made_by, tuple(context.evidence), checks)


def _files(
    checkpoint: Checkpoint, keep: bool, max_shard_size: int | None, linkable: Mapping[str, Header]
) -> tuple[tuple[ShardPlan, ...], dict[str, SideFile]]:
    """The weight files under the names that loaders look for, and the index where there are several."""
    groups = _groups(checkpoint, keep, max_shard_size)
    stem, suffix = _stem_and_suffix(checkpoint)
    names = [_shard_name(stem, suffix, i, len(groups)) for i in range(1, len(groups) + 1)]
    place = f"{checkpoint.subfolder}/" if checkpoint.subfolder else ""
    main = [
        _shard(place + name, [(n, checkpoint.tensors[n]) for n in group], checkpoint, keep, linkable)
        for name, group in zip(names, groups, strict=True)
    ]
    beside = [
        lay_out(file, list(tensors.items()), {}, keep=keep) for file, tensors in checkpoint.beside.items() if tensors
    ]
    index = {}
    if len(main) > 1:
        weight_map = {n: name for name, group in zip(names, groups, strict=True) for n in group}
        total = sum(t.info.nbytes for t in checkpoint.tensors.values())
        index[f"{place}{stem}{suffix}.index.json"] = SideFile(content=build_index(weight_map, total))
    return (*main, *beside), index


def _distributed(checkpoint: Checkpoint, max_shard_size: int | None) -> tuple[tuple[ShardPlan, ...], SideFile]:
    """The files of a distributed checkpoint, each tensor whole in one of them or in boxes, and its `.metadata`."""
    start = "".join(f"{word}." for word in checkpoint.under)
    boxes = {n: boxed(t, checkpoint.boxes.get(n, 0)) for n, t in checkpoint.tensors.items()}
    made = {start + n: each for n, each in in_files(boxes, max_shard_size or DEFAULT_MAX_SHARD_SIZE).items()}
    paths = default_paths(list(made), checkpoint.under)
    shards, metadata = lay_out_distcp(made, paths=paths, folder=checkpoint.subfolder)
    return shards, SideFile(content=metadata)


def _shard(
    file: str,
    tensors: list[tuple[str, LazyTensor]],
    checkpoint: Checkpoint,
    keep: bool,
    linkable: Mapping[str, Header],
) -> ShardPlan:
    linked = as_link(file, tensors, linkable) if linkable else None
    return linked or lay_out(file, tensors, checkpoint.metadata, keep=keep)


def is_adapter(checkpoint: Checkpoint) -> bool:
    """True where the files get the names that PEFT looks for."""
    return checkpoint.origin.kind == ADAPTER


def config_content(checkpoint: Checkpoint) -> bytes:
    """`config.json` as it will be written: verbatim where nothing changed, else as transformers formats it."""
    if checkpoint.config_bytes is not None:
        return checkpoint.config_bytes
    return (json.dumps(checkpoint.config, indent=2, sort_keys=True) + "\n").encode()


def _stem_and_suffix(checkpoint: Checkpoint) -> tuple[str, str]:
    """The name that loaders look for, in the checkpoint's container."""
    if checkpoint.stem:
        return checkpoint.stem, ".safetensors"
    if checkpoint.container == "torch":
        return ADAPTER_STEM if is_adapter(checkpoint) else TORCH_STEM, ".bin"
    return ADAPTER_STEM if is_adapter(checkpoint) else WEIGHTS_STEM, ".safetensors"


def _shard_name(stem: str, suffix: str, number: int, count: int) -> str:
    return f"{stem}{suffix}" if count == 1 else f"{stem}-{number:05d}-of-{count:05d}{suffix}"


def _expect_plain_names(checkpoint: Checkpoint, shards: Sequence[str], files: Mapping[str, SideFile]) -> None:
    """Names come from steps and dialects, strangers' ones too: none may lead out of the output, or be another's."""
    wrong = [f for f in checkpoint.beside if not _WEIGHT_FILE.fullmatch(f)]
    wrong += [checkpoint.subfolder] if checkpoint.subfolder and not _FOLDER.fullmatch(checkpoint.subfolder) else []
    # A distributed checkpoint's own small files lie with its weights.
    own = f"{checkpoint.subfolder}/" if checkpoint.subfolder and checkpoint.container == "distcp" else "/"
    around = [name for name in checkpoint.side_files if not name.startswith(own)]
    taken = {*files, RECEIPT, *(name.partition("/")[0] for name in around)}
    wrong += [f for i, f in enumerate(shards) if f in taken or f in shards[:i]]
    wrong += [checkpoint.subfolder] if checkpoint.subfolder in taken else []
    if wrong:
        raise Refused(
            "file-name",
            f"weights can't be written to {fold(wrong)}: not a plain name, or that of another file of the output",
            where=show(checkpoint.origin.asked),
            expected="a name such as value_head.safetensors, in no folder or in one",
        )


def _groups(checkpoint: Checkpoint, keep: bool, max_shard_size: int | None) -> list[list[str]]:
    """Names of the tensors of each file, in order."""
    names = list(checkpoint.tensors)
    if is_adapter(checkpoint):
        return [names]
    if checkpoint.one_file:
        size = sum(t.info.nbytes for t in checkpoint.tensors.values())
        if max_shard_size is not None and size > max_shard_size and len(names) > 1:
            raise Refused(
                "one-file",
                f"the trainer that this is for reads one file of weights, which has {format_size(size)}",
                where=show(checkpoint.origin.asked),
                got=f"--max-shard-size {format_size(max_shard_size)}",
                next="leave --max-shard-size out",
            )
        return [names]
    if keep:
        return _preserved(checkpoint, max_shard_size)
    return _packed(names, checkpoint, max_shard_size or DEFAULT_MAX_SHARD_SIZE)


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
