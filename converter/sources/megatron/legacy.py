"""Megatron's old format, `mp_rank_TT[_PPP][_EEE]/model_optim_rng.pt`: ranks' files put together to whole tensors.

`TT` is the TP rank, `PPP` the PP rank where there are several, `EEE` the EP rank where there are several: what a name
means only the arguments in the files say. Layers are numbered within a stage, experts within an EP rank. The result has
the names of a `torch_dist` checkpoint.

Source: `get_checkpoint_name` of
https://github.com/NVIDIA/Megatron-LM/blob/core_v0.16.1/megatron/training/checkpointing.py, and
`get_transformer_layer_offset` of megatron/core/transformer/transformer_layer.py there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from converter.core.formats.torch_file import Opaque, read_torch_file
from converter.core.tensors.nodes import Concat, LazyTensor, Stored, concat, reshape
from converter.errors import Refused
from converter.families.megatron.names import Value
from converter.families.megatron.rows import EMBEDDING, OUTPUT
from converter.families.megatron.splitting import joined, way
from converter.sources.megatron.arguments import ANY, plain_fields
from converter.sources.megatron.ranks import (
    RankFile,
    Ranks,
    expect_ends,
    expect_no_copy,
    expect_one_iteration,
    expect_own_files,
)
from converter.sources.megatron_files import RANK_FILE, RANK_FOLDER, rank_folders
from converter.text import fold, show

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)", re.ASCII)
_NEXT_TOKENS = re.compile(r"(mtp\.layers\.\d+\.(?:transformer_layer\.|mtp_model_layer\.)?)(.+)", re.ASCII)
"""Of layers for multi-token prediction, which are not numbered by stage."""
_LOCAL_EXPERT = re.compile(r"mlp\.experts\.local_experts\.(\d+)\.(linear_fc[12]\.(?:weight|bias))", re.ASCII)
_GROUPED_EXPERT = re.compile(r"mlp\.experts\.(linear_fc[12]\.(?:weight|bias))(\d+)", re.ASCII)
_CHUNK = re.compile(r"model(\d*)", re.ASCII)
_MAYBE_ROWS = {
    "self_attention.linear_q_down_proj.weight": ("q_lora_rank",),
    "self_attention.linear_kv_down_proj.weight": ("kv_lora_rank", "qk_pos_emb_head_dim"),
}
"""Split over rows by some classes of layers, and whole on each rank by others: the sizes that a whole one has."""


def read_ranks(folder: Path) -> Ranks:
    """Every rank's file, by headers.

    Raises:
        Refused: a file without arguments or model (`megatron-malformed`), of another run, save or rank
            (`megatron-mixed`), or missing (`megatron-rank-missing`), or there twice (`megatron-copies`); a layout of
            layers that is not read (`megatron-backend`).
    """
    ranks: Ranks | None = None
    seen: dict[object, Path] = {}
    iterations: dict[str, Value] = {}
    written: list[tuple[str, tuple[int, int], Value, Value]] = []
    for place in rank_folders(folder):
        path = place / RANK_FILE
        read = read_torch_file(path, root=folder, allow_names=ANY)
        state = read.value if isinstance(read.value, dict) else {}
        given = state.get("args")
        arguments = plain_fields(given.state if isinstance(given, Opaque) else given)
        chunks = {int(m[1] or 0): v for k, v in state.items() if isinstance(k, str) and (m := _CHUNK.fullmatch(k))}
        if arguments is None or not chunks or sorted(chunks) != list(range(len(chunks))):
            what = "it holds no model, or no arguments that say which rank's it is"
            raise Refused("megatron-malformed", what, where=show(path))
        ranks = ranks or Ranks(folder, arguments)
        if any(arguments.get(k) != ranks.arguments.get(k) for k in _SAME):
            what = f"{show(place.name)} is of a run with other sizes than {show(ranks.files[0].path.parent.name)}"
            raise ranks.refuse("megatron-mixed", what, next="put the files of one save into one folder")
        tp, pp, ep = _place(place.name, ranks)
        written.append((place.name, (tp, pp), arguments.get("rank"), arguments.get("world_size")))
        models = [_tensors(chunks[n], ranks) for n in range(len(chunks))]
        values = tuple((c.length, c.crc) for c in read.checks) or read.digest
        expect_no_copy(ranks, RankFile(tp, pp, ep, path, models), seen.setdefault(values, path))
        ranks.files.append(RankFile(tp, pp, ep, path, models))
        ranks.checks += read.checks
        ranks.inputs[str(path.absolute())] = read.identity
        ranks.digests.append(read.digest)
        ranks.others |= {k for k in state if isinstance(k, str) and not _CHUNK.fullmatch(k)}
        iterations[place.name] = state.get("iteration")
    assert ranks is not None
    _expect_all(ranks)
    expect_one_iteration(iterations, ranks)
    expect_ends(ranks)
    expect_own_files(written, ranks)
    return ranks


_SAME = (
    "num_layers", "hidden_size", "tensor_model_parallel_size", "pipeline_model_parallel_size",
    "expert_model_parallel_size", "num_experts",
)  # fmt: skip


def _tensors(value: Any, ranks: Ranks) -> dict[str, LazyTensor]:
    """A model's tensors; what modules keep beside them (`_extra_state`) is not a weight."""
    if not isinstance(value, dict):
        raise ranks.refuse("megatron-malformed", "a rank's model is not a dictionary of tensors")
    held = {k: v for k, v in value.items() if isinstance(k, str) and isinstance(v, LazyTensor)}
    return {k: v for k, v in held.items() if not k.endswith("_extra_state")}


def _place(name: str, ranks: Ranks) -> tuple[int, int, int]:
    """TP, PP and EP rank of a folder's name."""
    match = RANK_FOLDER.fullmatch(name)
    assert match is not None
    numbers = [int(n) for n in match.groups() if n is not None]
    wanted = [True, ranks.pp > 1, ranks.ep > 1]
    sizes = (max(ranks.tp, ranks.expert_tp), ranks.pp, ranks.ep)
    if len(numbers) != sum(wanted):
        what = f"{show(name)} is not a name of a rank of TP {ranks.tp}, PP {ranks.pp}, EP {ranks.ep}"
        raise ranks.refuse("megatron-mixed", what)
    found = tuple(numbers.pop(0) if is_there else 0 for is_there in wanted)
    if any(n >= size for n, size in zip(found, sizes, strict=True)):
        what = f"{show(name)} is beyond TP {ranks.tp}, PP {ranks.pp}, EP {ranks.ep}, which its arguments say"
        raise ranks.refuse("megatron-mixed", what)
    return found[0], found[1], found[2]


def _expect_all(ranks: Ranks) -> None:
    """Every rank that holds something of its own has a file; those that only repeat others need none."""
    if ranks.arguments.get("pipeline_model_parallel_layout") is not None or _has_uneven_chunks(ranks):
        what = "its layers are laid over stages by a table, which is not read"
        raise ranks.refuse("megatron-backend", what, next="load it with Megatron and save it as torch_dist")
    dense = {(f.tp, f.pp) for f in ranks.files}
    experts = {(f.pp, f.ep) for f in ranks.files}
    lost = [f"TP {t}, PP {p}" for t in range(ranks.tp) for p in range(ranks.pp) if (t, p) not in dense]
    lost += [f"PP {p}, EP {e}" for p in range(ranks.pp) for e in range(ranks.ep) if (p, e) not in experts]
    if lost:
        raise ranks.refuse(
            "megatron-rank-missing",
            f"files of ranks are missing: {fold(lost)}. With each, a part of every tensor on it is lost",
            next="copy them from the nodes that wrote them; nothing else holds these values",
        )


def _has_uneven_chunks(ranks: Ranks) -> bool:
    """True where virtual stages do not have the same number of layers each: then their order is not known."""
    counts = {_layers(c) for f in ranks.files for c in f.chunks if len(f.chunks) > 1}
    return len(counts) > 1


def _layers(chunk: Mapping[str, LazyTensor]) -> int:
    return max((int(m[1]) + 1 for k in chunk if (m := _LAYER.fullmatch(k))), default=0)


def whole_tensors(ranks: Ranks) -> dict[str, LazyTensor]:
    """Whole tensors by the names of a `torch_dist` checkpoint.

    Raises:
        Refused: copies that differ between ranks (`megatron-copies`), or experts that are not read
            (`megatron-backend`).
    """
    found: dict[str, LazyTensor] = {}
    experts: dict[tuple[str, int], dict[int, LazyTensor]] = {}
    begin = 0
    for stage in range(ranks.pp):
        files = [f for f in ranks.files if f.pp == stage]
        count = len(files[0].chunks)
        each = _layers(files[0].chunks[0])
        for number in range(count):
            first = begin if count == 1 else number * each * ranks.pp + stage * each
            for name in dict.fromkeys(k for f in files for k in f.chunks[number]):
                held = [(f, f.chunks[number][name]) for f in files if name in f.chunks[number]]
                _place_one(name, held, first, ranks, found, experts)
        begin += each
    for (name, _), numbered in experts.items():
        ordered = [numbered[n] for n in sorted(numbered)]
        found[name] = concat([reshape(t, (1, *t.info.shape)) for t in ordered], 0)
    output, embedding = found.get(OUTPUT), found.get(EMBEDDING)
    is_one = ranks.arguments.get("untie_embeddings_and_output_weights") is False
    if is_one and output is not None and embedding is not None and output.info == embedding.info:
        _expect_copy(OUTPUT, embedding, output, ranks)
    return found


def _place_one(
    name: str,
    held: list[tuple[RankFile, LazyTensor]],
    first: int,
    ranks: Ranks,
    found: dict[str, LazyTensor],
    experts: dict[tuple[str, int], dict[int, LazyTensor]],
) -> None:
    match, next_tokens = _LAYER.fullmatch(name), _NEXT_TOKENS.fullmatch(name)
    rest = name if match is None else match[2]
    stem = "" if match is None else f"decoder.layers.{first + int(match[1])}."
    if next_tokens is not None:
        stem, rest = next_tokens[1], next_tokens[2]
    if rest.startswith(("mlp.experts.weight1", "mlp.experts.weight2")):
        what = f"{show(name)} is of an old class of grouped experts, whose matrices are not put together"
        raise ranks.refuse("megatron-backend", what, next="load it with Megatron and save it as torch_dist")
    local, leaf = None, ""
    if expert := _LOCAL_EXPERT.fullmatch(rest):
        local, leaf = int(expert[1]), expert[2]
    elif expert := _GROUPED_EXPERT.fullmatch(rest):
        local, leaf = int(expert[2]), expert[1]
    if local is None:
        by_rank = {f.tp: t for f, t in held}
        made = _joined(rest, [by_rank[n] for n in sorted(by_rank)], ranks)
        if (before := found.get(stem + rest)) is not None:
            _expect_copy(name, before, made, ranks)
        found.setdefault(stem + rest, made)
        return
    total = ranks.arguments.get("num_experts")
    each = total // ranks.ep if type(total) is int else 0
    for rank in range(ranks.ep):
        own = {f.tp: t for f, t in held if f.ep == rank}
        if own:
            parts = [own[n] for n in sorted(own)] if ranks.expert_tp > 1 else [own[min(own)]]
            key = (f"{stem}mlp.experts.experts.{leaf}", first)
            experts.setdefault(key, {})[rank * each + local] = _joined(leaf, parts, ranks)


def _joined(name: str, parts: list[LazyTensor], ranks: Ranks) -> LazyTensor:
    """One tensor of what the TP ranks have of it."""
    if len(parts) == 1:
        return parts[0]
    how = way(name)
    if how != "copies":
        return joined(parts, how)
    if name == "output_layer.weight" and _is_vocabulary(parts, ranks):
        return joined(parts, "rows")
    whole = [ranks.arguments.get(k) for k in _MAYBE_ROWS.get(name, ())]
    sizes = [n for n in whole if type(n) is int]
    if whole and len(sizes) == len(whole) and parts[0].info.shape[0] * len(parts) == sum(sizes):
        return concat(parts, 0)
    return _same(name, parts, ranks)


def _is_vocabulary(parts: list[LazyTensor], ranks: Ranks) -> bool:
    """True for an output embedding, whose rows are split; a value head is whole on each rank."""
    rows = parts[0].info.shape[0] if parts[0].info.shape else 0
    padded = ranks.arguments.get("padded_vocab_size")
    return rows * len(parts) == padded if type(padded) is int else rows > 1


def _expect_copy(name: str, one: LazyTensor, other: LazyTensor, ranks: Ranks) -> None:
    """Go on where two stages have the same values: the last keeps the embedding too where it needs it.

    Raises:
        Refused: they are not the same (`megatron-copies`).
    """
    sums = {(c.file, c.offset): c.crc for c in ranks.checks}
    digests = [[sums.get((run.file, run.offset)) for run in _stored(t)] for t in (one, other)]
    if one.info != other.info or digests[0] != digests[1]:
        what = f"{show(name)} is in two stages, and the copies differ: files of two saves, or of another layout"
        raise ranks.refuse("megatron-copies", what)


def _stored(tensor: LazyTensor) -> list[Stored]:
    match tensor:
        case Stored():
            return [tensor]
        case Concat():
            return [s for part in tensor.parts for s in _stored(part)]
        case _:
            return []


def _same(name: str, parts: list[LazyTensor], ranks: Ranks) -> LazyTensor:
    """The first of copies, whose checksums in their files must be one."""
    sums = {(c.file, c.offset): c.crc for c in ranks.checks}
    digests = {sums.get((p.file, p.offset)) for p in parts if isinstance(p, Stored)}
    if len({p.info for p in parts}) > 1 or len(digests) > 1:
        what = (
            f"{show(name)} is a copy on each TP rank, and the copies differ: files of two saves, or of another layout"
        )
        raise ranks.refuse("megatron-copies", what)
    return parts[0]
