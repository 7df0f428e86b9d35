"""Pairs of factors over experts: those of a whole stack taken apart, and those of single experts put together.

transformers 5 and PEFT from 0.17 on have the experts of a layer in one parameter and one pair of factors for all of
them; transformers 4, older PEFT and vLLM have a module for each. Taken apart, each expert's gate and up projection get
the A of both. Put together, they stand block by block in factors of the ranks' sum, and an expert without a pair has
zeros: either way every update is what it was.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from converter.converters.adapters.pairs import Pair, PlainLora, scale_for
from converter.converters.merge.adapter_keys import Module
from converter.converters.merge.expert_sites import ExpertSites
from converter.converters.merge.experts import find_experts
from converter.core.checkpoint import Checkpoint
from converter.core.tensors import nodes as tensors
from converter.core.tensors.dtypes import TensorInfo
from converter.core.tensors.kernel_specs import Param
from converter.core.tensors.low_rank_specs import FACTOR
from converter.core.tensors.nodes import LazyTensor
from converter.errors import Refused
from converter.families.memory_names import architectures
from converter.families.stacks import Stack, find_stacks, one_of, parameter_order
from converter.families.words import LORA_PAIR, PEFT_PREFIX
from converter.text import show


def scaled(factor: LazyTensor, scale: float = 1.0, *, turned: bool = False) -> LazyTensor:
    """A factor times a number, its dimensions exchanged or not; the factor itself where that is nothing."""
    if scale == 1 and not turned:
        return factor
    params: dict[str, Param] = {"scale": float(scale), "transposed": turned, "out": factor.info.dtype.value}
    return tensors.apply(FACTOR, (factor,), params)


def padded(factor: LazyTensor, dim: int, before: int, after: int) -> LazyTensor:
    """A factor with zeros around it along a dimension."""
    parts = [_zeros(factor, dim, before), factor, _zeros(factor, dim, after)]
    return tensors.concat([p for p in parts if p.info.shape[dim]], dim)


def _zeros(like: LazyTensor, dim: int, length: int) -> LazyTensor:
    shape = like.info.shape
    return tensors.Filled(TensorInfo(like.info.dtype, (*shape[:dim], length, *shape[dim + 1 :])), 0)


def named(module: str, a: LazyTensor, b: LazyTensor, scale: float) -> Pair:
    """A pair under PEFT's names."""
    first, second = (f"{PEFT_PREFIX}{module}.{part}.weight" for part in LORA_PAIR)
    return Pair(module, (first, second), a, b, a.info.shape[0], scale)


# One by one


def taken_apart(found: PlainLora, adapter: Checkpoint, base: Checkpoint) -> tuple[Pair, ...]:
    """The pairs, those of stacks as pairs of single experts under the names that the base has on disk.

    Raises:
        Refused: the base has the experts in one tensor, so that there is no module of each (`adapter-stacked`), or the
            adapter does not fit the base (see `find_experts`, `ExpertSites`).
    """
    where = show(adapter.origin.asked)
    modules = {p.module: Module(p.module, dict(zip(LORA_PAIR, (p.a, p.b), strict=True))) for p in found.pairs}
    classes = architectures(base.config, adapter.config)
    experts = find_experts(modules, base.tensors, classes, adapter.config, where).found
    stacked = {n: e for n, e in experts.items() if e.expert is None}
    scales = {name: scale_for(found.config, each.name) for name, each in stacked.items()}
    made: dict[str, list[Pair]] = {}
    for name, placed in ExpertSites(base, found.config, adapter.config, 1.0, "best", where).placed(stacked):
        for each in placed:
            if each.region is not None:
                what = f"{show(each.disk)} holds all experts in the base: none of them is a module with a name"
                raise Refused("adapter-stacked", what, where=where)
            a, b = (each.site.module.factors[part] for part in LORA_PAIR)
            if each.site.turned:
                a, b = scaled(b, turned=True), scaled(a, turned=True)
            made.setdefault(name, []).append(named(each.disk.removesuffix(".weight"), a, b, scales[name]))
    return tuple(p for pair in found.pairs for p in made.get(pair.module, [pair]))


# Together


@dataclass(frozen=True)
class Joined:
    """Pairs of which some are over stacks, and the parameters that these are over."""

    pairs: tuple[Pair, ...]
    parameters: tuple[str, ...]


def put_together(found: Sequence[Pair], base: Checkpoint, adapter: Mapping[str, Any]) -> Joined:
    """The pairs, those of single experts as one pair for each stack that a load makes of them.

    Args:
        adapter: the config of an adapter, which may name the class that it was trained on.

    Raises:
        Refused: the base's experts are not whole (`base-experts`).
    """
    built = next(iter(architectures(base.config, adapter)), None)
    stacks = find_stacks(built, {n: t.info for n, t in base.tensors.items()})
    for stack in stacks.values():
        if stack.fault:
            what = f"the base's {show(stack.name)} is not whole: {stack.fault}"
            raise Refused("base-experts", what, where=show(base.origin.asked))
    of_stack: dict[str, dict[tuple[int, str], Pair]] = {}
    plain: list[Pair] = []
    for pair in found:
        place = one_of(f"{pair.module}.weight", built)
        if place is None or place.stack not in stacks or place.leaf not in stacks[place.stack].rows:
            plain.append(pair)
        else:
            of_stack.setdefault(place.stack, {})[place.expert, place.leaf] = pair
    made = {name: _joined(stacks[name], held) for name, held in of_stack.items()}
    return Joined((*plain, *_nested(made)), tuple(made))


def _joined(stack: Stack, held: Mapping[tuple[int, str], Pair]) -> Pair:
    """One pair for all experts: A `[experts * r, in]`, B `[out, r * experts]` with the experts side by side."""
    scale = next(iter(held.values())).scale
    leaves = [leaf for leaf in stack.rows if any(key[1] == leaf for key in held)]
    ranks = {leaf: max(p.rank for key, p in held.items() if key[1] == leaf) for leaf in leaves}
    like = next(iter(held.values()))
    firsts, seconds = [], []
    for expert in range(stack.experts):
        rows, columns = [], []
        at, total = 0, sum(ranks.values())
        for leaf, (start, stop) in stack.rows.items():
            rank = ranks.get(leaf, 0)
            pair = held.get((expert, leaf))
            a, b = _sides(pair, like, stack, stop - start, rank, scale)
            rows.append(a)
            columns.append(padded(b, 1, at, total - at - rank) if rank else _matrix(like.b, stop - start, total))
            at += rank
        firsts.append(tensors.concat([r for r in rows if r.info.shape[0]], 0))
        second = tensors.concat(columns, 0)
        seconds.append(tensors.reshape(second, (*second.info.shape, 1)))
    whole = tensors.concat(seconds, 2)
    height, rank, count = whole.info.shape
    b = tensors.reshape(whole, (height, rank * count))
    return Pair(stack.name, ("", ""), tensors.concat(firsts, 0), b, rank, scale, is_stacked=True)


def _sides(
    pair: Pair | None, like: Pair, stack: Stack, height: int, rank: int, scale: float
) -> tuple[LazyTensor, LazyTensor]:
    """A and B of an expert's part at a rank; zeros where it has none."""
    if pair is None:
        return _matrix(like.a, rank, stack.matrix[1]), _matrix(like.b, height, rank)
    more = rank - pair.rank
    return padded(pair.a, 0, 0, more), padded(scaled(pair.b, pair.scale / scale), 1, 0, more)


def _matrix(like: LazyTensor, rows: int, columns: int) -> LazyTensor:
    return tensors.Filled(TensorInfo(like.info.dtype, (rows, columns)), 0)


def _nested(made: Mapping[str, Pair]) -> Iterator[Pair]:
    """The pairs under the keys of PEFT's wrappers: that of the parameter which is declared last is the outermost."""
    order = {leaf: at for at, leaf in enumerate(parameter_order())}
    modules: dict[str, list[str]] = {}
    for name in made:
        modules.setdefault(name.rpartition(".")[0], []).append(name)
    for module, names in modules.items():
        names.sort(key=lambda n: order.get(n.rpartition(".")[2], len(order)))
        for depth, name in enumerate(reversed(names)):
            stem = f"{PEFT_PREFIX}{module}{'.base_layer' * depth}"
            first, second = (f"{stem}.{part}.weight" for part in LORA_PAIR)
            yield dataclasses.replace(made[name], keys=(first, second))


def of_experts(pairs: Sequence[Pair]) -> list[str]:
    """Modules that are over experts, of which only the base says how many there are and what they are called."""
    return [p.module for p in pairs if p.is_stacked or ".experts" in f".{p.module}"]
