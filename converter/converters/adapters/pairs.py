"""Pairs of factors of a plain LoRA adapter, each with its rank and its scale, and a config for others in their place.

A scale belongs to a module, and what reads the adapter computes it from alpha and rank by patterns over names. A step
that changes ranks gives every module an alpha of its own, so that each scale stays what it was.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from converter.converters.merge.adapter_config import read_adapter_config
from converter.converters.merge.adapter_keys import read_modules
from converter.converters.merge.methods.lora import METHOD
from converter.converters.merge.methods.method import AdapterConfig
from converter.converters.merge.patterns import matching
from converter.core.checkpoint import ADAPTER, Checkpoint
from converter.core.tensors.nodes import LazyTensor
from converter.diagnostic import Command, as_argument
from converter.errors import Refused
from converter.families.words import LORA_EMBEDDING_PAIR, LORA_PAIR
from converter.text import fold, show


@dataclass(frozen=True)
class Pair:
    """A and B of a module.

    Attributes:
        module: its name in the adapter, without PEFT's prefix.
        keys: the adapter's keys of A and of B.
        rank: as the config has it: of a stack of experts that of one.
        is_stacked: A is `[experts * rank, in]`.
    """

    module: str
    keys: tuple[str, str]
    a: LazyTensor
    b: LazyTensor
    rank: int
    scale: float
    is_stacked: bool = False


@dataclass(frozen=True)
class PlainLora:
    """A plain LoRA adapter.

    Attributes:
        rest: everything that is no factor of a pair, by key: whole modules, biases, token rows.
    """

    config: AdapterConfig
    pairs: tuple[Pair, ...]
    rest: Mapping[str, LazyTensor]


def read_pairs(adapter: Checkpoint) -> PlainLora:
    """The adapter's pairs.

    Raises:
        Refused: it is no adapter (`not-an-adapter`), or one of another method than plain LoRA (`not-plain-lora`), a
            pair is not whole (`adapter-incomplete`), or has another rank than the config's (`adapter-rank`).
    """
    where = show(adapter.origin.asked)
    if adapter.origin.kind != ADAPTER:
        step = Command("inspect", (as_argument(adapter.origin.asked),))
        raise Refused("not-an-adapter", "there is no adapter in it", where=where, next=step)
    config = read_adapter_config(adapter)
    if config.method is not METHOD:
        what = f"its method is {config.method.title}, and this is of plain LoRA"
        raise Refused("not-plain-lora", what, where=where, next="merge it: rlhf-convert merge-lora")
    if config.fields["init_lora_weights"] in ("pissa", "olora"):
        what = "its start moved the base by a part of the rank that it had, and PEFT does so again when it loads it"
        raise Refused("adapter-base-moved", what, where=where, facts={"field": "init_lora_weights"})
    keys = {id(t): key for key, t in adapter.tensors.items()}
    pairs: list[Pair] = []
    used: set[str] = set()
    for name, module in read_modules(adapter.tensors, where).modules.items():
        names = LORA_EMBEDDING_PAIR if LORA_EMBEDDING_PAIR[0] in module.factors else LORA_PAIR
        if not module.factors:
            continue
        if lacking := [n for n in names if n not in module.factors]:
            raise Refused("adapter-incomplete", f"{show(name)}: {fold(lacking)} is missing", where=where)
        a, b = (module.factors[n] for n in names)
        pairs.append(_pair(name, (keys[id(a)], keys[id(b)]), (a, b), config, adapter.config, where))
        used |= {keys[id(a)], keys[id(b)]}
    if not pairs:
        raise Refused("adapter-empty", "it has no factors", where=where)
    return PlainLora(config, tuple(pairs), {k: t for k, t in adapter.tensors.items() if k not in used})


def _pair(
    name: str,
    keys: tuple[str, str],
    factors: tuple[LazyTensor, LazyTensor],
    config: AdapterConfig,
    raw: Mapping[str, Any],
    where: str,
) -> Pair:
    a, b = factors
    rank, scale = _rank_for(config, name), scale_for(config, name)
    rows, columns = (a.info.shape or (0,))[0], (*b.info.shape, 0, 0)[1]
    is_stacked = bool(raw.get("target_parameters")) and rows != rank
    if rows != columns or (rows != rank and not is_stacked):
        raise Refused(
            "adapter-rank",
            f"the rank of {show(name)} is not the one in adapter_config.json",
            where=where,
            expected=f"r = {rank}",
            got=f"r = {rows} in A and {columns} in B",
        )
    return Pair(name, keys, a, b, rank, scale, is_stacked)


def _rank_for(config: AdapterConfig, name: str) -> int:
    rank: int = matching(config.fields["rank_pattern"], name, config.fields["r"])
    return rank


def scale_for(config: AdapterConfig, name: str) -> float:
    """`alpha / r` of a module by its name, or `alpha / sqrt(r)` with rank-stabilised LoRA."""
    rank = _rank_for(config, name)
    alpha: float = matching(config.fields["alpha_pattern"], name, config.fields["lora_alpha"])
    return alpha / math.sqrt(rank) if config.fields["use_rslora"] else alpha / rank


def with_ranks(config: Mapping[str, Any], pairs: Sequence[Pair]) -> dict[str, Any]:
    """A config in which every pair has its rank and its scale, under patterns of whole names where these differ."""
    is_rslora = bool(config.get("use_rslora"))
    alphas = {p.module: _whole(p.scale * (math.sqrt(p.rank) if is_rslora else p.rank)) for p in pairs}
    ranks = {p.module: p.rank for p in pairs}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    return {
        **config,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {m: r for m, r in ranks.items() if r != rank},
        "alpha_pattern": {m: a for m, a in alphas.items() if a != alpha},
    }


def _whole(number: float) -> float | int:
    """A number as JSON has it: whole ones as such, though a square root left a last bit."""
    near = round(number)
    return near if abs(number - near) <= 1e-12 * max(abs(number), 1) else number
