"""Experts that DeepSpeed spread over ranks: its own mixture-of-experts layers, and AutoEP's.

Weights in the training dtype lie in a file an expert, under the number that it has among all. A rank's optimizer has
the experts that are its own under the numbers that they have there: the groups of such parameters are cut over the
ranks with the same experts alone, of which there are as many as `partition_count` says.

Source: `_save_moe_checkpoint` of https://github.com/deepspeedai/DeepSpeed/blob/v0.19.8/deepspeed/runtime/engine.py and
`_create_expert_and_data_parallel` of deepspeed/utils/groups.py, which says whose experts a rank has.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from converter.core.tensors import nodes as tensors
from converter.core.tensors.nodes import LazyTensor
from converter.sources.deepspeed.files import EXPERT_FILE
from converter.sources.survey import file_names
from converter.text import fold, show

if TYPE_CHECKING:
    from converter.sources.deepspeed.state import Shards

OPTIMIZER = re.compile(r"expp_rank_(\d{1,6})_mp_rank_(\d{1,4})_optim_states\.pt", re.ASCII)
GROUPS = "ds_zero_partition_groups"
_OWN = re.compile(r"(.*\.deepspeed_moe\.experts\.deepspeed_experts\.)(\d+)(\..+)", re.ASCII)
_STACKED = re.compile(r"(.+\.experts\.w[123])\.(\d+)", re.ASCII)
_STACK = re.compile(r".+\.experts\.w[123]", re.ASCII)


_WITH_DEEPSPEED = "load it with DeepSpeed in the training script, and save it gathered"


def expert_files(shards: Shards) -> dict[tuple[int, int], str]:
    """Files by layer and expert, all of which are there.

    Raises:
        Refused: some are missing, or they are of a form that isn't read (`zero-experts`).
    """
    found: dict[tuple[int, int], str] = {}
    for name in sorted(file_names(shards.folder)):
        match = EXPERT_FILE.fullmatch(name)
        if match is None:
            continue
        if match[1] is None or int(match[3]) != 0:
            what = "of an old version, without the layer's number" if match[1] is None else "of tensor-parallel ranks"
            text = f"the files of experts are {what}, which are not read"
            raise shards.refuse("zero-experts", text, file=name, next=_WITH_DEEPSPEED)
        found[int(match[1]), int(match[2])] = name
    counts = shards.model().get("num_experts")
    sound = isinstance(counts, list) and all(type(n) is int and 0 < n < 10**6 for n in counts)
    listed = counts if sound and isinstance(counts, list) and sum(counts) < 10**6 else None
    if listed is None:
        text = "the model file doesn't say how many experts its layers have (`num_experts`)"
        raise shards.refuse("zero-experts", text, file=shards.model_file(), next=_WITH_DEEPSPEED)
    wanted = {(layer, e) for layer, count in enumerate(listed) for e in range(count)}
    if wanted != found.keys():
        lost = [f"layer_{i}_expert_{e}" for i, e in sorted(wanted - found.keys())]
        extra = [found[k] for k in sorted(found.keys() - wanted)]
        what = (
            f"files of experts are missing: {fold(lost)}" if lost else f"more experts than the run had: {fold(extra)}"
        )
        raise shards.refuse(
            "zero-experts", what, next="copy them from the nodes that wrote them; nothing else holds these experts"
        )
    return found


def expert_weights(shards: Shards) -> dict[str, LazyTensor]:
    """Weights of all experts by name, in the training dtype; AutoEP's as the stacks that they are in memory.

    Raises:
        Refused: files are missing or hold something else (`zero-experts`).
    """
    found: dict[str, LazyTensor] = {}
    stacks: dict[str, dict[int, LazyTensor]] = {}
    for (_, expert), file in sorted(expert_files(shards).items()):
        for name, tensor in shards.open(file).items():
            own, stacked = _OWN.fullmatch(str(name)), _STACKED.fullmatch(str(name))
            number = own[2] if own else stacked[2] if stacked else None
            if not isinstance(tensor, LazyTensor) or number is None or int(number) != expert or name in found:
                text = f"it holds {show(str(name))}, and that is no weight of expert {expert}"
                raise shards.refuse("zero-experts", text, file=file)
            if stacked:
                stacks.setdefault(stacked[1], {})[expert] = tensor
            else:
                found[str(name)] = tensor
    for name, experts in stacks.items():
        if sorted(experts) != list(range(len(experts))) or len({t.info for t in experts.values()}) != 1:
            raise shards.refuse("zero-experts", f"the experts of {show(name)} are not of one form, or not all there")
        found[name] = stacked_tensors([experts[e] for e in sorted(experts)])
    return found


def stacked_tensors(parts: Sequence[LazyTensor]) -> LazyTensor:
    """Tensors of one form along a new first dimension."""
    return tensors.concat([tensors.reshape(t, (1, *t.info.shape)) for t in parts], 0)


@dataclass(frozen=True)
class Ranks:
    """Which ranks hold the partitions of a group: those of each set of experts, in the order of the experts.

    Attributes:
        sets: ranks by set; one set with all ranks for what is no expert's.
    """

    sets: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, shards: Shards, count: int) -> Ranks:
        """The ranks of a group that was cut in `count` parts.

        Raises:
            Refused: the ranks can't be dealt out so (`zero-experts`).
        """
        ranks = shards.ranks
        if count < 1 or ranks % count:
            raise shards.refuse("zero-experts", f"a group of parameters lies on {count} of {ranks} ranks")
        return cls.dealt(ranks, ranks // count, is_data_first=is_data_first(shards.model().get("ds_config")))

    @classmethod
    def dealt(cls, ranks: int, sets: int, *, is_data_first: bool) -> Ranks:
        """The ranks of each of `sets` sets of experts."""
        count = ranks // sets
        if is_data_first:
            return cls(tuple(tuple(range(e * count, (e + 1) * count)) for e in range(sets)))
        return cls(tuple(tuple(range(e, ranks, sets)) for e in range(sets)))

    def place(self, rank: int) -> tuple[int, int]:
        """The set of a rank, and its number in that."""
        return next((number, ranks.index(rank)) for number, ranks in enumerate(self.sets) if rank in ranks)


def is_data_first(config: Any) -> bool:
    """Whether a run's settings put ranks with the same experts side by side."""
    return isinstance(config, dict) and config.get("use_data_before_expert_parallelism") is True


def rank_sets(shards: Shards, index: int, count: int) -> tuple[tuple[int, ...], ...]:
    """The ranks that hold a sub-group of stage 3, which was cut in `count` parts: by set of experts, in their order.

    Raises:
        Refused: the files contradict each other (`zero-experts`).
    """
    if count == shards.ranks:
        return (tuple(range(count)),)
    places: dict[tuple[int, ...], int] = {}
    for rank in range(shards.ranks):
        listed = shards.optim(rank).get(GROUPS)
        own = listed[index] if isinstance(listed, list) and index < len(listed) else None
        ranks = tuple(own.get("partition_ranks") or ()) if isinstance(own, dict) else ()
        if len(ranks) != count or not all(type(n) is int for n in ranks) or rank not in ranks:
            text = f"the file doesn't say which {count} ranks hold sub-group {index}"
            raise shards.refuse("zero-experts", text, file=shards.files.optimizers[rank])
        layers = shards.model(rank).get("ds_autoep_layers")
        known = isinstance(layers, list) and all(isinstance(n, dict) and type(n.get("ep_rank")) is int for n in layers)
        number = {layer["ep_rank"] for layer in layers} if known and isinstance(layers, list) else set()
        if len(number) != 1 or places.setdefault(ranks, *number) not in number:
            text = "which experts a rank holds is not recorded, or is not the same in all files"
            raise shards.refuse("zero-experts", text, file=shards.model_file(rank))
    sets = tuple(sorted(places, key=lambda ranks: places[ranks]))
    if sorted(places.values()) != list(range(len(sets))) or sorted(r for s in sets for r in s) != list(
        range(shards.ranks)
    ):
        raise shards.refuse("zero-experts", f"the ranks of sub-group {index} are not all of the run's, each once")
    return sets


@dataclass(frozen=True)
class Numbers:
    """The numbers of experts among all, by those on a rank.

    Attributes:
        local: by what stands before the number in a name: how many experts a rank has.
    """

    local: Mapping[str, int]

    @classmethod
    def of(cls, shards: Shards, names: Iterable[str]) -> Numbers:
        """The numbers of a rank's names.

        Raises:
            Refused: they are not counted from 0 (`zero-experts`).
        """
        held: dict[str, set[int]] = {}
        for name in names:
            if match := _OWN.fullmatch(name):
                held.setdefault(match[1], set()).add(int(match[2]))
        for before, numbers in held.items():
            if numbers != set(range(len(numbers))):
                text = f"the experts of {show(before)} on a rank are not numbered from 0: {sorted(numbers)[:8]}"
                raise shards.refuse("zero-experts", text, file=shards.model_file())
        return cls({before: len(numbers) for before, numbers in held.items()})

    def name(self, name: str, number: int) -> str:
        """The name among all of an expert of the set of that number."""
        match = _OWN.fullmatch(name)
        return name if match is None else f"{match[1]}{number * self.local[match[1]] + int(match[2])}{match[3]}"


def all_names(shards: Shards, group: Mapping[str, tuple[int, ...]], sets: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes among all ranks of a group that one rank lists, with `sets` sets of experts."""
    numbers = Numbers.of(shards, group)
    found: dict[str, tuple[int, ...]] = {}
    for number in range(sets):
        for name, shape in group.items():
            if _STACK.fullmatch(name) and shape:
                found[name] = (shape[0] * sets, *shape[1:])
            else:
                found[numbers.name(name, number)] = shape
    return found


def joined(shards: Shards, group: Iterable[str], by_set: Sequence[Mapping[str, LazyTensor]]) -> dict[str, LazyTensor]:
    """Tensors of a group by their names among all ranks, from those of each set of experts."""
    numbers = Numbers.of(shards, group)
    found: dict[str, LazyTensor] = {}
    for number, own in enumerate(by_set):
        for name, tensor in own.items():
            if _OWN.fullmatch(name):
                found[numbers.name(name, number)] = tensor
            elif _STACK.fullmatch(name):
                found[name] = tensors.concat([found[name], tensor], 0) if name in found else tensor
            else:
                text = f"{show(name)} lies on some of the ranks, and is no expert's in a form that is known"
                raise shards.refuse("zero-experts", text, file=shards.model_file())
    return found


def router_aliases(shards: Shards) -> dict[str, str]:
    """Second names of AutoEP's routers, by the first: it keeps each where transformers had its own, too.

    DeepSpeed doesn't list them among shared parameters, and in stage 3 they are empty places.
    """
    layers = shards.model().get("ds_autoep_layers")
    paths = (
        [layer.get("module_path") for layer in layers if isinstance(layer, dict)] if isinstance(layers, list) else []
    )
    return {f"{p}.gate.gate.weight": f"{p}.router.gate.weight" for p in paths if isinstance(p, str)}


def placed_in_order(shards: Shards) -> None:
    """AutoEP's experts must lie on the ranks in their order, which is all that it does.

    Raises:
        Refused: another placement (`zero-experts`).
    """
    layers = shards.model().get("ds_autoep_layers")
    for layer in layers if isinstance(layers, list) else []:
        facts = layer if isinstance(layer, dict) else {}
        count, placement = facts.get("num_local_experts"), facts.get("expert_placement")
        listed: Any = placement.get("ranks") if isinstance(placement, dict) else None
        for entry in listed if isinstance(listed, list) else []:
            rank, own = (entry.get("rank"), entry.get("experts")) if isinstance(entry, dict) else (None, None)
            if not (type(rank) is int and type(count) is int and isinstance(own, list)) or own != [
                rank * count + i for i in range(len(own))
            ]:
                raise shards.refuse("zero-experts", "experts were placed on the ranks in an order of their own")
