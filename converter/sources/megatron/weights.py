"""The weights of a `torch_dist` checkpoint by Megatron's own names, each layer apart, with what lies beside them.

It is a checkpoint of torch's, whose keys are those of tensors over all ranks: how the writer split the model over TP,
PP, VPP and EP ranks is not in it. Layers that are alike are one tensor, `decoder.layers.mlp.linear_fc2.weight` of shape
`[L, ...]`; others have their number in the key. Which it is only the keys tell.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from converter.core.checkpoint import Checkpoint, Origin, RecordCheck, SideFile
from converter.core.files.opening import Identity, identity
from converter.core.tensors.nodes import LazyTensor, concat, narrow, reshape
from converter.diagnostic import Again, Command, Steps
from converter.errors import Refused
from converter.families.megatron.names import ARGUMENTS_FILE, Value
from converter.sources.base import Held
from converter.sources.beside import Beside, find_beside
from converter.sources.dcp.chunks import Pieces
from converter.sources.dcp.metadata import Metadata, read_metadata
from converter.sources.megatron.arguments import read_arguments
from converter.sources.megatron.legacy import read_ranks, whole_tensors
from converter.sources.megatron.places import STEP
from converter.sources.megatron.run_config import recorded
from converter.sources.megatron.swift_lora import gates_first, recorded_lora
from converter.sources.megatron_files import MANIFEST, expect_read, kind_here
from converter.sources.places import Place
from converter.sources.survey import file_names, is_weights_of_model, snapshot_of
from converter.text import fold, show

Moment = Literal["exp_avg", "exp_avg_sq"]
KIND = "training"
_LAYERS = re.compile(r"(?P<stem>decoder\.layers\.)(?!\d+\.)(?P<rest>.+)", re.ASCII)
_OPTIMIZER = re.compile(r"(?:chained_\d+\.)?optimizer\.", re.ASCII)
_STATE = re.compile(
    r"(?:chained_\d+\.)?optimizer\.state\.(?P<leaf>exp_avg|exp_avg_sq|fp32_param|param)\.(?P<key>.+)", re.ASCII
)
_MASTERS = ("fp32_param", "param")
"""What masters are called by the optimizer that is not distributed, and by the one that is."""
_BUCKETS = re.compile(r"(?:chained_\d+\.)?optimizer\.distributed\.dp_group_idx_", re.ASCII)
_EXTRA = re.compile(r".+\._extra_state(?:/shard_[\d.]+_[\d.]+)?", re.ASCII)
_BUFFERS = re.compile(r".+\.(?:local|global)_tokens_per_expert(?:_ema)?", re.ASCII)
_HALF = re.compile(r"(?P<stem>.+\.linear_fc1\.(?:weight|bias))_(?P<which>[wv])", re.ASCII)
_EXPERT = re.compile(r"(?P<stem>.+\.mlp\.experts\.experts\.)(?P<number>\d+)\.(?P<rest>.+)", re.ASCII)
_CONFIGS = ("hf", "huggingface", "model/huggingface", "huggingface/adapter", "model/huggingface/adapter")
"""Folders with config and tokenizer, below a checkpoint or beside it; verl exports an adapter with its config too."""


@dataclass(frozen=True)
class Weights:
    """A model's tensors by Megatron's names, and what is recorded with them.

    Attributes:
        arguments: of the training script, where they are recorded.
        dropped: keys that are not taken, with the reason.
    """

    tensors: dict[str, LazyTensor]
    arguments: dict[str, Value] | None
    words: str
    digest: str
    dropped: dict[str, str]
    checks: tuple[RecordCheck, ...]
    inputs: dict[str, Identity]


def read_weights(folder: Path, *, master: bool = False) -> Weights:
    """All tensors of the model, from headers.

    Args:
        master: the optimizer's fp32 copies of them instead.

    Raises:
        Refused: see `expect_read`; files missing, cut short or malformed; no model (`dcp-no-model`); no masters
            (`dcp-no-masters`).
    """
    if kind_here(folder) == "legacy":
        return _of_ranks(folder, master=master)
    expect_read(folder)
    metadata = read_metadata(folder)
    arguments, inputs = read_arguments(metadata)
    own = {k: k for k in metadata.tensors if not _OPTIMIZER.match(k) and not _BUFFERS.fullmatch(k)}
    if not own:
        raise metadata.refuse("dcp-no-model", "no weights of a model are here: it was saved without them")
    if flat := [k for k in own if k in metadata.flattened]:
        text = f"{len(flat)} weights are stretches of flat buffers, which are not put together: {fold(flat)}"
        raise metadata.refuse("megatron-backend", text, next="load it with Megatron and save it as torch_dist")
    chosen = _masters(metadata, own) if master else own
    pieces = Pieces(metadata)
    read = gates_first(pieces.read(chosen.values()), metadata, arguments)
    found = _by_layer({name: read[key] for name, key in chosen.items()}, metadata)
    inputs[str((folder / MANIFEST).absolute())] = identity(folder / MANIFEST)
    files = len({place.file for place in metadata.places.values()})
    words = f"Megatron-core torch_dist, {files} {'file' if files == 1 else 'files'}"
    dropped = _reasons(metadata, own, is_master=master)
    return Weights(found, arguments, words, pieces.digest, dropped, tuple(pieces.checks), pieces.inputs | inputs)


def _of_ranks(folder: Path, *, master: bool) -> Weights:
    """The same of the old format."""
    ranks = read_ranks(folder)
    found = {k: t for k, t in whole_tensors(ranks).items() if not _BUFFERS.fullmatch(k)}
    low = [k for k, t in found.items() if t.info.dtype.is_float and t.info.dtype.bits < 32]
    if master and low:
        what = f"{len(low)} weights were saved in less than fp32, and Megatron's old format has no names for masters"
        raise ranks.refuse("dcp-no-masters", f"{what}: {fold(low)}")
    sizes = ", ".join(f"{word} {n}" for word, n in (("TP", ranks.tp), ("PP", ranks.pp), ("EP", ranks.ep)) if n > 1)
    words = f"Megatron's old format, {sizes or 'one rank'}"
    dropped = dict.fromkeys(sorted(ranks.others), "no part of a model: it lies beside it in the trainer's state")
    digest = hashlib.sha256("\n".join(ranks.digests).encode()).hexdigest()
    return Weights(found, ranks.arguments, words, digest, dropped, tuple(ranks.checks), ranks.inputs)


def _masters(metadata: Metadata, own: Mapping[str, str]) -> dict[str, str]:
    """Keys of fp32 masters by the weights' keys; a weight that is fp32 is its own."""
    held = {k: name for leaf in reversed(_MASTERS) for k, name in states(metadata, leaf).items()}
    low = [k for k in own if (t := metadata.tensors[k].dtype) is not None and t.is_float and t.bits < 32]
    lost = [k for k in low if k not in held]
    if lost:
        why = "there are no fp32 masters beside them by name"
        if any(_BUCKETS.match(k) for k in metadata.tensors):
            why = "their fp32 masters lie in flat buffers without names (dp_reshardable), which only a live model's "
            why += "order of parameters tells apart; --dist-ckpt-optim-fully-reshardable saves them by name"
        raise metadata.refuse(
            "dcp-no-masters",
            f"{len(lost)} weights were saved in less than fp32, and {why}: {fold(lost)}",
            next=Steps(
                Again(leave_out=("--master",), otherwise=Command("gather", (str(metadata.folder), "OUT"))),
                ", without --master: the weights in the dtype of training",
            ),
        )
    return {k: held.get(k, k) for k in own}


def states(metadata: Metadata, leaf: str) -> dict[str, str]:
    """Keys of the optimizer's tensors of one kind, by the weights' keys."""
    matches = ((k, _STATE.fullmatch(k)) for k in metadata.tensors if k not in metadata.flattened)
    return {m["key"]: k for k, m in matches if m is not None and m["leaf"] == leaf}


def _by_layer(held: Mapping[str, LazyTensor], metadata: Metadata) -> dict[str, LazyTensor]:
    """Stacked layers apart, halves that were saved apart together, experts that were saved apart stacked."""
    found: dict[str, LazyTensor] = {}
    counts = {t.info.shape[:1] for k, t in held.items() if _LAYERS.fullmatch(k)}
    if len(counts) > 1:
        listed = ", ".join(str(list(c)) for c in sorted(counts))
        raise metadata.refuse("dcp-malformed", f"stacked layers are of several numbers of layers: {listed}")
    for key, tensor in held.items():
        match = _LAYERS.fullmatch(key)
        if match is None:
            found[key] = tensor
            continue
        for number in range(tensor.info.shape[0] if tensor.info.shape else 0):
            one = reshape(narrow(tensor, 0, number, 1), tensor.info.shape[1:])
            found[f"{match['stem']}{number}.{match['rest']}"] = one
    return _experts_stacked(_halves_joined(found))


def _halves_joined(held: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
    """`weight_w` and `weight_v` as one: gate, then up."""
    found: dict[str, LazyTensor] = {}
    for key, tensor in held.items():
        match = _HALF.fullmatch(key)
        other = None if match is None else held.get(f"{match['stem']}_v")
        if match is None or other is None or (match["which"] == "v" and f"{match['stem']}_w" not in held):
            found[key] = tensor
        elif match["which"] == "w":
            found[match["stem"]] = concat([tensor, other], 0)
    return found


def _experts_stacked(held: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
    """`experts.experts.3.linear_fc2.weight` and its like as one tensor, where all numbers are there."""
    groups: dict[tuple[str, str], dict[int, str]] = {}
    for key in held:
        if (match := _EXPERT.fullmatch(key)) is not None:
            groups.setdefault((match["stem"], match["rest"]), {})[int(match["number"])] = key
    found = dict(held)
    for (stem, rest), keys in groups.items():
        if sorted(keys) == list(range(len(keys))):
            each = [found.pop(keys[n]) for n in range(len(keys))]
            found[stem + rest] = concat([reshape(t, (1, *t.info.shape)) for t in each], 0)
    return found


def _reasons(metadata: Metadata, own: Iterable[str], *, is_master: bool) -> dict[str, str]:
    """What is not taken, and why; an optimizer's entries as one."""
    taken = frozenset(own)
    found: dict[str, str] = {}
    keys = (*metadata.tensors, *metadata.blobs)
    if count := sum(1 for k in keys if _OPTIMIZER.match(k)):
        found["optimizer.*"] = f"the optimizer's state, {count} entries: no part of a model"
    if is_master:
        found["decoder.*"] = "weights in the dtype of training, in whose place their fp32 masters are"
    if count := sum(1 for k in metadata.blobs if _EXTRA.fullmatch(k)):
        found["*._extra_state"] = f"what TransformerEngine keeps of its scales, {count} entries: no weights"
    for key in keys:
        if key in taken or _OPTIMIZER.match(key) or _EXTRA.fullmatch(key):
            continue
        is_buffer = key in metadata.tensors
        found[key] = (
            "counts tokens while training" if is_buffer else "it is not a tensor, but state of the trainer's own"
        )
    return found


def open_chosen(
    chosen: Place, root: Path, *, asked: str, revision: str | None, keep_code: bool, master: bool
) -> Checkpoint:
    """A checkpoint's folder, found at or below `root`, by Megatron's names."""
    found = read_weights(chosen.folder, master=master)
    beside = _beside(chosen.folder.absolute(), keep_code)
    told = [f"{show(chosen.folder.name)}: {chosen.why}"] if chosen.folder != root else []
    told += _sizes_said(found.arguments)
    run = recorded(chosen.folder)
    if found.arguments is not None or run.arguments:
        known = {**run.arguments, **(found.arguments or {})}
        beside.files[ARGUMENTS_FILE] = SideFile(content=json.dumps(known, sort_keys=True).encode())
    lora = recorded_lora(found.tensors, found.arguments)
    beside.files, beside.inputs = lora | run.files | beside.files, beside.inputs | run.inputs
    real = chosen.folder.resolve()
    return Checkpoint(
        tensors=found.tensors,
        config=beside.config,
        origin=Origin(KIND, str(real), asked, _name(real), revision, found.digest, found.words),
        side_files=beside.files,
        config_bytes=beside.config_bytes,
        dropped=found.dropped,
        inputs=beside.inputs | found.inputs,
        checks=found.checks,
        said=(*told, *beside.said),
    )


_SIZES = {
    "TP": "tensor_model_parallel_size", "PP": "pipeline_model_parallel_size", "EP": "expert_model_parallel_size",
}  # fmt: skip


def _sizes_said(arguments: Mapping[str, Value] | None) -> list[str]:
    """Over how many ranks the run split its model, where that is recorded: nothing depends on it."""
    found = {word: (arguments or {}).get(key) for word, key in _SIZES.items()}
    many = [f"{word} {n}" for word, n in found.items() if type(n) is int and n > 0]
    return [f"the run had {', '.join(many)}"] if many else []


def _name(folder: Path) -> str:
    """A name that tells checkpoints apart: verl calls every one of its folders the same."""
    if (found := snapshot_of(folder)) is not None:
        return found[0]
    steps = [p.name for p in (folder, *folder.parents[:4]) if STEP.fullmatch(p.name)]
    inside = folder if not steps else next(p for p in (folder, *folder.parents) if p.name == steps[-1])
    return f"{inside.name}/{folder.relative_to(inside).as_posix()}".removesuffix("/.")


def _beside(folder: Path, keep_code: bool) -> Beside:
    """Config and tokenizer: in the folder, in those that trainers keep them in, and above, up to the run's folder."""
    above = [folder, *list(folder.parents)[:5]]
    steps = [n for n, p in enumerate(above[:-1]) if STEP.fullmatch(p.name)]
    places = above[: (steps[-1] if steps else 0) + 2]
    inside = [p / name for p in places for name in _CONFIGS]
    folders = [p for each in places for p in (each, *(each / name for name in _CONFIGS)) if p.is_dir()]
    found = find_beside(folders, keep_code=keep_code)
    found.said = [s.replace("above the shards, in ", "in ") for s in found.said]
    if exported := [p for p in inside if is_weights_of_model(file_names(p))]:
        names = fold([show(p.name) for p in exported])
        found.said.append(f"{names} holds weights that the trainer exported; those of the shards are gathered")
    return found


def moments_of(folder: Path, which: Moment) -> dict[str, LazyTensor]:
    """Adam's first or second moment by Megatron's names.

    Raises:
        Refused: no optimizer was saved, or not by names (`dcp-no-moments`).
    """
    if kind_here(folder) == "legacy":
        what = "Megatron's old format has no names for the optimizer's state"
        raise Refused("dcp-no-moments", what, where=show(folder))
    expect_read(folder)
    metadata = read_metadata(folder)
    keys = states(metadata, which)
    if not keys:
        why = "there is no state of Adam by parameter names"
        if any(_BUCKETS.match(k) for k in metadata.tensors):
            why += ": it lies in flat buffers (dp_reshardable); --dist-ckpt-optim-fully-reshardable saves it by name"
        raise metadata.refuse("dcp-no-moments", why)
    read = Pieces(metadata).read(keys.values())
    return _by_layer({name: read[key] for name, key in keys.items()}, metadata)


def held_in(folder: Path) -> Held:
    """Files and tensors of a folder."""
    found = read_weights(folder)
    files = [Path(p).name for p in found.inputs if Path(p).parent == folder.absolute()]
    return Held(folder, files, found.tensors, [", ".join((found.words, *_sizes_said(found.arguments)))])
