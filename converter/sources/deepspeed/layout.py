"""From DeepSpeed's flat partitions back to parameters: which elements of which rank's file make up which tensor.

Stages 1 and 2: the parameters of an optimizer group are laid end to end in the order of `param_shapes` (the round-robin
order, where that was on), each but the last followed by its alignment padding, and the whole is cut into one stretch a
rank. Stage 3: every parameter is cut by itself, ceil(numel / ranks) elements a rank; a rank lays its pieces end to end,
sub-group after sub-group.

Source: https://github.com/deepspeedai/DeepSpeed/blob/v0.19.8/deepspeed/runtime/zero/stage_1_and_2.py and stage3.py;
`param_slice_mappings` is not used: it is wrong under round robin.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from converter.core.tensors import nodes as tensors
from converter.core.tensors.dtypes import DType, TensorInfo
from converter.core.tensors.nodes import Filled, LazyTensor
from converter.sources.deepspeed.experts import GROUPS, Ranks, all_names, joined, rank_sets
from converter.sources.deepspeed.state import BF16_OPTIMIZER, Shards, all_optimizers, shapes, tensor_list
from converter.sources.deepspeed.zero_folder import MASTER, Shapes, State, universal_tensors
from converter.text import show


def trained_shapes(shards: Shards) -> list[Shapes]:
    """Shapes of the trained parameters, one mapping for each optimizer group (stage 3: sub-group), in flat order.

    Experts that were spread over the ranks are listed under their numbers among all.
    """
    listed = listed_shapes(shards)
    if not shards.experts or shards.stage not in (1, 2, 3):
        return listed
    counts = partition_counts(shards, len(listed))
    return [all_names(shards, g, shards.ranks // n) for g, n in zip(listed, counts, strict=True)]


def partition_counts(shards: Shards, groups: int) -> list[int]:
    """Over how many ranks each optimizer group (stage 3: sub-group) is cut.

    Raises:
        Refused: the optimizer files say something else (`zero-sizes`).
    """
    if not shards.files.optimizers:
        return [shards.ranks] * groups
    value = _recorded_counts(shards)
    counts = value if isinstance(value, list) else [value if type(value) is int else shards.ranks] * groups
    if len(counts) != groups or not all(type(n) is int and n > 0 and shards.ranks % n == 0 for n in counts):
        text = f"param_shapes has {groups} groups for {shards.ranks} ranks, partition_count is {show(value)}"
        raise shards.refuse("zero-sizes", text)
    return counts


def _recorded_counts(shards: Shards) -> Any:
    state = shards.optim(min(shards.files.optimizers))
    if shards.stage < 3:
        return state.get("partition_count")
    listed = state.get(GROUPS)
    return [g.get("partition_count") for g in listed if isinstance(g, dict)] if isinstance(listed, list) else None


def listed_shapes(shards: Shards) -> list[Shapes]:
    """The same under the names that the model file has: those on its rank."""
    value = shards.model().get("param_shapes")
    file = shards.model_file()
    groups = value if isinstance(value, list) else [value] if isinstance(value, dict) else None
    if groups is None:
        raise shards.refuse("zero-malformed", "the model file has no param_shapes", file=file)
    found = [shapes(shards, g, file) for g in groups]
    names = [n for g in found for n in g]
    if len(set(names)) != len(names):
        raise shards.refuse("zero-malformed", "param_shapes names a parameter twice", file=file)
    return found


def trained_tensors(shards: Shards, state: State = MASTER) -> dict[str, LazyTensor]:
    """Every trained parameter's fp32 master, or one of its states in the optimizer (Adam's moments), by name.

    Raises:
        Refused: files are missing or mixed, or sizes contradict each other (`zero-sizes`).
    """
    if shards.stage == 0:
        raise shards.refuse("zero-no-masters", "without ZeRO the optimizer's states are not stored by name")
    if shards.universal:
        return universal_tensors(shards, trained_shapes(shards), state)
    states = all_optimizers(shards)
    return _stage_3(shards, states, state) if shards.stage == 3 else _stage_1_2(shards, states, state)


def _stage_1_2(shards: Shards, states: Sequence[Mapping[Any, Any]], state: State) -> dict[str, LazyTensor]:
    found: dict[str, LazyTensor] = {}
    for group, own in zip(listed_shapes(shards), _by_set(shards, states, state), strict=True):
        found |= own[0] if len(own) == 1 else joined(shards, group, own)
    return found


def tensors_by_set(shards: Shards, state: State) -> list[list[dict[str, LazyTensor]]]:
    """The same of stages 1 and 2 by group, and in it by set of experts, under the names that they have on a rank.

    Raises:
        Refused: see `trained_tensors`.
    """
    return list(_by_set(shards, all_optimizers(shards), state))


def _by_set(shards: Shards, states: Sequence[Mapping[Any, Any]], state: State) -> Iterator[list[dict[str, LazyTensor]]]:
    groups = listed_shapes(shards)
    parts = [_flat_parts(shards, rank, found, state) for rank, found in enumerate(states)]
    counts = partition_counts(shards, len(groups))
    for index, (group, count) in enumerate(zip(groups, counts, strict=True)):
        if any(len(p) != len(groups) for p in parts):
            raise shards.refuse(
                "zero-sizes", f"param_shapes has {len(groups)} groups, an optimizer file has another number"
            )
        sets = Ranks.of(shards, count).sets
        yield [_cut(shards, index, group, [parts[r][index] for r in ranks], state) for ranks in sets]


def _cut(
    shards: Shards, index: int, group: Shapes, stretches: Sequence[LazyTensor], state: State
) -> dict[str, LazyTensor]:
    """The parameters of a group of stages 1 and 2, from the stretches of the ranks that hold it."""
    flat = tensors.concat(list(stretches), 0)
    gaps = gaps_of(shards, shards.optim(0).get("param_alignment_paddings"), index, len(group))
    needed = sum(math.prod(s) for s in group.values()) + sum(gaps)
    length, unit = flat.info.numel, 2 * len(stretches)
    padded = math.ceil(needed / unit) * unit
    is_lean = state == MASTER and shards.optimizer != BF16_OPTIMIZER
    if length not in ((needed,) if is_lean else (needed, padded)):
        raise shards.refuse(
            "zero-sizes",
            f"group {index} has {needed} elements by param_shapes, and the optimizer files hold {length}: they are "
            "not of one checkpoint, or in a layout that is not known",
        )
    found: dict[str, LazyTensor] = {}
    offset = 0
    for (name, shape), gap in zip(group.items(), gaps, strict=True):
        count = math.prod(shape)
        found[name] = _whole([tensors.narrow(flat, 0, offset, count)], shape, flat.info)
        offset += count + gap
    return found


def gaps_of(shards: Shards, paddings: Any, index: int, count: int) -> list[int]:
    """Elements of padding after each parameter of a group (since 0.19.8)."""
    if paddings is None:
        return [0] * count
    own = paddings[index] if isinstance(paddings, list) and index < len(paddings) else None
    if not isinstance(own, list) or len(own) != count or not all(type(n) is int and 0 <= n < 64 for n in own):
        raise shards.refuse("zero-malformed", "param_alignment_paddings does not fit param_shapes")
    return own


def _flat_parts(shards: Shards, rank: int, found: Mapping[Any, Any], state: State) -> list[LazyTensor]:
    """One rank's stretch of each group."""
    file = shards.files.optimizers[rank]
    if state == MASTER:
        return tensor_list(
            shards, found.get("single_partition_of_fp32_groups"), "single_partition_of_fp32_groups", file
        )
    base = found.get("base_optimizer_state")
    if isinstance(base, dict):  # rigid: torch's own state, by parameter number
        base = _by_number(base)
    values = [s.get(state) for s in base] if isinstance(base, list) and all(isinstance(s, dict) for s in base) else None
    _expect_kept(shards, rank, values or [], state)
    return tensor_list(shards, values, state, file)


def _expect_kept(shards: Shards, rank: int, values: Sequence[Any], state: State) -> None:
    """Of an optimizer that isn't Adam, already the first rank has no moments of it.

    Raises:
        Refused: it has none (`no-moments`).
    """
    if rank == 0 and values and all(v is None for v in values):
        text = f"the optimizer keeps no `{state}`: it isn't Adam, or has not taken a step"
        raise shards.refuse("no-moments", text, file=shards.files.optimizers[rank])


def _by_number(base: Mapping[Any, Any]) -> list[Any] | None:
    """States of torch's state_dict in the order of its parameter groups."""
    state, groups = base.get("state"), base.get("param_groups")
    if not isinstance(state, dict) or not isinstance(groups, list):
        return None
    numbers = [n for g in groups if isinstance(g, dict) and isinstance(g.get("params"), list) for n in g["params"]]
    return [state.get(n) for n in numbers if not isinstance(n, list | dict)]


def expect_states(shards: Shards, kinds: Iterable[State]) -> None:
    """What `trained_tensors` refuses of a run's states, without putting the tensors of stage 3 together.

    Raises:
        Refused: see `trained_tensors`.
    """
    if shards.stage < 3 or shards.universal:
        for state in kinds:
            trained_tensors(shards, state)
        return
    states, groups = all_optimizers(shards), listed_shapes(shards)
    counts = partition_counts(shards, len(groups))
    for state in kinds:
        _flats(shards, states, state, groups, counts)


def _stage_3(shards: Shards, states: Sequence[Mapping[Any, Any]], state: State) -> dict[str, LazyTensor]:
    groups = listed_shapes(shards)
    counts = partition_counts(shards, len(groups))
    flats = _flats(shards, states, state, groups, counts)
    found_tensors: dict[str, LazyTensor] = {}
    offset = 0
    for index, (group, parts_of) in enumerate(zip(groups, counts, strict=True)):
        sets = rank_sets(shards, index, parts_of)
        own = [_pieces(group, [flats[r] for r in ranks], offset) for ranks in sets]
        found_tensors |= own[0] if len(sets) == 1 else joined(shards, group, own)
        offset += sum(share(math.prod(s), parts_of) for s in group.values())
    return found_tensors


def _flats(
    shards: Shards, states: Sequence[Mapping[Any, Any]], state: State, groups: Sequence[Shapes], counts: Sequence[int]
) -> list[LazyTensor | None]:
    """What each rank has, its sub-groups end to end.

    Raises:
        Refused: it isn't as much as the parameters' shapes give (`zero-sizes`).
    """
    pairs = list(zip(groups, counts, strict=True))
    needed = sum(share(math.prod(s), count) for g, count in pairs for s in g.values())
    flats: list[LazyTensor | None] = []
    for rank, found in enumerate(states):
        parts = _sub_groups(shards, rank, found, state)
        held = sum(p.info.numel for p in parts)
        if needed != held:
            raise shards.refuse(
                "zero-sizes",
                f"a rank's share is {needed} elements by param_shapes, and the file holds {held}: it is not of this "
                "checkpoint, or in a layout that is not known",
                file=shards.files.optimizers[rank],
            )
        flats.append(tensors.concat(parts, 0) if parts else None)
    return flats


def _pieces(group: Shapes, flats: Sequence[LazyTensor | None], offset: int) -> dict[str, LazyTensor]:
    """Parameters of a sub-group that begins at `offset` in what each of its ranks has."""
    found: dict[str, LazyTensor] = {}
    for name, shape in group.items():
        count = math.prod(shape)
        part = share(count, len(flats))
        pieces = [
            tensors.narrow(flat, 0, offset, min(part, count - place * part))
            for place, flat in enumerate(flats)
            if flat is not None and place * part < count
        ]
        assert pieces or not count
        first = next((f.info for f in flats if f is not None), None)
        assert first is not None
        found[name] = _whole(pieces, shape, first)
        offset += part
    return found


def _sub_groups(shards: Shards, rank: int, found: Mapping[Any, Any], state: State) -> list[LazyTensor]:
    file = shards.files.optimizers[rank]
    masters = tensor_list(shards, found.get("fp32_flat_groups"), "fp32_flat_groups", file)
    if state == MASTER:
        return masters
    inner = found.get("optimizer_state_dict")
    base = inner.get("state") if isinstance(inner, dict) else None
    own = [base.get(i) for i in range(len(masters))] if isinstance(base, dict) else []
    values = [s.get(state) if isinstance(s, dict) else None for s in own]
    _expect_kept(shards, rank, values, state)
    return tensor_list(shards, values, state, file)


def frozen_tensors(shards: Shards) -> dict[str, LazyTensor]:
    """Frozen parameters that the model files keep (stages 2 and 3), by name.

    Raises:
        Refused: a fragment doesn't fit its shape (`zero-sizes`), or was quantised (`zero-malformed`).
    """
    file = shards.model_file()
    value = shards.model().get("frozen_param_shapes")
    if not value:
        return {}
    found: dict[str, LazyTensor] = {}
    for name, shape in shapes(shards, value, file).items():
        count = math.prod(shape)
        part = share(count, shards.ranks)
        pieces: list[LazyTensor] = []
        for rank in range(shards.ranks if shards.stage == 3 else 1):
            length = min(part, count - rank * part) if shards.stage == 3 else count
            fragments = shards.model(rank).get("frozen_param_fragments") if count else None
            fragment = fragments.get(name) if isinstance(fragments, dict) else None
            if length <= 0:
                continue
            if not isinstance(fragment, LazyTensor) or fragment.info.numel < length:
                text = f"the frozen parameter {name!r} {list(shape)} has no fragment of {length} elements"
                raise shards.refuse("zero-sizes", text, file=shards.model_file(rank))
            if fragment.info.dtype is DType.I8:
                text = (
                    f"the frozen parameter {name!r} is kept as whole numbers of 8 bits without their scales, as "
                    "DeepSpeed does under zero_quantized_nontrainable_weights: its values are in none of the files"
                )
                raise shards.refuse("zero-malformed", text, file=shards.model_file(rank))
            flat = tensors.reshape(fragment, (fragment.info.numel,))
            pieces.append(tensors.narrow(flat, 0, 0, length))
        like = pieces[0].info if pieces else _placeholder_info(shards, name)
        if like is not None:
            found[name] = _whole(pieces, shape, like)
    return found


def _placeholder_info(shards: Shards, name: str) -> TensorInfo | None:
    module = shards.model().get("module")
    held = module.get(name) if isinstance(module, dict) else None
    return held.info if isinstance(held, LazyTensor) else None


def share(count: int, ranks: int) -> int:
    """Elements that each rank has of a parameter in stage 3; the last ranks' end in padding."""
    return -(-count // ranks)


def _whole(pieces: Sequence[LazyTensor], shape: tuple[int, ...], like: TensorInfo) -> LazyTensor:
    """Flat pieces as one tensor of a shape."""
    if math.prod(shape) == 0:
        return Filled(TensorInfo(like.dtype, shape), 0)
    return tensors.reshape(tensors.concat(list(pieces), 0), shape)
