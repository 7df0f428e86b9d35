"""Megatron's old format, written: `mp_rank_TT[_PPP][_EEE]/model_optim_rng.pt` for each rank that loads one.

A rank's file has the names of its modules, so it is written for one kind of modules; numbers of layers are of the
stage, those of experts of the EP rank.

Source: `get_checkpoint_name` and `save_checkpoint` of
https://github.com/NVIDIA/Megatron-LM/blob/core_v0.16.1/megatron/training/checkpointing.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from converter.core.formats.pickle_values import Built, Global, Ordered
from converter.core.formats.torch_tree import saved
from converter.core.tensors.nodes import LazyTensor, narrow, reshape
from converter.families.megatron.rows import EMBEDDING, OUTPUT
from converter.families.megatron.splitting import split, way

Modules = Literal["transformer-engine", "grouped", "local"]
"""Whose modules load it: TransformerEngine's with experts one by one or grouped (`--moe-grouped-gemm`), or
megatron-core's own (`--transformer-impl local`)."""

RANK_FILE = "model_optim_rng.pt"
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)", re.ASCII)
_EXPERTS = ".mlp.experts.experts."
_LOCAL = (
    ("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"),
    ("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"),
    ("self_attention.linear_q_up_proj.layer_norm_weight", "self_attention.q_layernorm.weight"),
    ("self_attention.linear_kv_up_proj.layer_norm_weight", "self_attention.kv_layernorm.weight"),
)
"""Names of norms that TransformerEngine has inside of the matrix behind them."""
_DOWN = re.compile(r".*linear_(?:q|kv)_down_proj\.weight", re.ASCII)


@dataclass(frozen=True)
class Ranks:
    """Over how many ranks a model is split.

    Attributes:
        etp: ranks that an expert's matrices are split over.
    """

    tp: int = 1
    pp: int = 1
    ep: int = 1
    etp: int = 1

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """TP and EP rank of each process that has a file of its own, in Megatron's order of ranks."""
        world = math.lcm(self.tp, self.etp * self.ep)
        return list(dict.fromkeys((n % self.tp, n // self.etp % self.ep) for n in range(world)))

    def folder(self, tp: int, pp: int, ep: int) -> str:
        """A rank's folder."""
        found = f"mp_rank_{tp:02d}"
        found += f"_{pp:03d}" if self.pp > 1 else ""
        return found + (f"_{ep:03d}" if self.ep > 1 else "")


def by_rank(
    held: Mapping[str, LazyTensor], arguments: Mapping[str, Any], ranks: Ranks, modules: Modules, *, layers: int
) -> dict[str, Any]:
    """What each rank's file says, by its path below the checkpoint.

    Args:
        held: whole tensors by key, layers apart.

    Raises:
        ValueError: layers, experts, heads or rows are not divided by the ranks.
    """
    if layers % ranks.pp:
        raise ValueError(f"{layers} layers are not divided by {ranks.pp} stages")
    args = Built(Global("argparse", "Namespace"), (), is_new=True)
    args.state = dict(arguments)
    found: dict[str, Any] = {}
    has_head = OUTPUT in held and held[OUTPUT].info.shape[0] != held[EMBEDDING].info.shape[0]
    for stage in range(ranks.pp):
        placed = [(key, _in_stage(key, stage, layers // ranks.pp, ranks.pp), t) for key, t in held.items()]
        own = [(name, tensor) for key, name, tensor in placed if name is not None]
        own += _again(held, stage, ranks.pp)
        for tp, ep in ranks.pairs:
            model = Ordered(
                (name, saved(part))
                for key, t in own
                for name, part in _on_rank(key, t, tp, ep, ranks, modules, has_head=has_head)
            )
            tree = {"args": args, "checkpoint_version": 3.0, "iteration": 0, "model": model}
            found[f"{ranks.folder(tp, stage, ep)}/{RANK_FILE}"] = tree
    return found


def _in_stage(key: str, stage: int, each: int, stages: int) -> str | None:
    """The key in a stage; None where the tensor is in another."""
    match = _LAYER.fullmatch(key)
    if match is not None:
        number = int(match[1]) - stage * each
        return f"decoder.layers.{number}.{match[2]}" if 0 <= number < each else None
    return key if (stage == 0) == (key == EMBEDDING) or stages == 1 else None


def _again(held: Mapping[str, LazyTensor], stage: int, stages: int) -> list[tuple[str, LazyTensor]]:
    """What the last stage has of the first: the embedding, as output of a tied model and for further tokens."""
    if stages == 1 or stage != stages - 1:
        return []
    found = [] if OUTPUT in held else [(OUTPUT, held[EMBEDDING])]
    return found + ([(EMBEDDING, held[EMBEDDING])] if any(k.startswith("mtp.") for k in held) else [])


def _on_rank(
    key: str, tensor: LazyTensor, tp: int, ep: int, ranks: Ranks, modules: Modules, *, has_head: bool
) -> Iterator[tuple[str, LazyTensor]]:
    """A tensor's part on one rank, by the name that its module has; a head is whole on each."""
    if _EXPERTS in key:
        yield from _experts(key, tensor, tp, ep, ranks, modules)
        return
    how = "rows" if key == OUTPUT and not has_head else way(key)
    if modules == "local":
        how = "rows" if _DOWN.fullmatch(key) else how
        for theirs, ours in _LOCAL:
            key = key.replace(theirs, ours)
    yield key, split(tensor, how, ranks.tp)[tp]


def _experts(
    key: str, tensor: LazyTensor, tp: int, ep: int, ranks: Ranks, modules: Modules
) -> Iterator[tuple[str, LazyTensor]]:
    count = tensor.info.shape[0]
    if count % ranks.ep:
        raise ValueError(f"{count} experts are not divided by {ranks.ep} ranks")
    stem, _, leaf = key.partition(_EXPERTS)
    each = count // ranks.ep
    for number in range(each):
        whole = reshape(narrow(tensor, 0, ep * each + number, 1), tensor.info.shape[1:])
        name = f"linear_fc{leaf[9]}.{leaf.rpartition('.')[2]}{number}"
        name = name if modules == "grouped" else f"local_experts.{number}.{leaf}"
        yield f"{stem}.mlp.experts.{name}", split(whole, way(leaf), ranks.etp)[tp % ranks.etp]
