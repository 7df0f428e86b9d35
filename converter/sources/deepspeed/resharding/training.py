"""What a ZeRO run trained, whole: every parameter's master and optimizer states by name, whoever's file they lie in.

Per-element states (Adam's moments) are cut as the masters are. What is one number for many parameters (a step) has to
be the same on all ranks, since it goes to other ranks' files. Everything else, as the rows and columns of Adafactor,
belongs to a cut and is refused by its name.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converter.core.files.opening import open_input, read_exact
from converter.core.tensors import nodes as tensors
from converter.core.tensors.nodes import LazyTensor, Stored
from converter.sources.deepspeed.agreement import expect_one_save
from converter.sources.deepspeed.layout import (
    frozen_tensors,
    listed_shapes,
    partition_counts,
    tensors_by_set,
    trained_tensors,
)
from converter.sources.deepspeed.resharding.cuts import Rules, flat_layout, sub_groups
from converter.sources.deepspeed.resharding.kept import kept_of, universal_states
from converter.sources.deepspeed.state import BF16_OPTIMIZER, Shards, all_optimizers, common_state
from converter.sources.deepspeed.zero_folder import MASTER, Shapes
from converter.text import fold, show


@dataclass(frozen=True)
class Group:
    """A parameter group of the optimizer.

    Attributes:
        shapes: its parameters in the optimizer's order.
        settings: learning rate, weight decay and so on, as a tree; without its parameters.
        sets: by set of experts, of which there is one where they weren't spread: by `master` or the optimizer's key:
            flat tensors by the parameter's name.
        keys: keys of the optimizer's state, in their order; none before the first step.
        numbers: those of them that are one number for the group: lazy tensors, or numbers.
    """

    shapes: Shapes
    settings: Mapping[Any, Any]
    sets: tuple[Mapping[str, Mapping[str, LazyTensor]], ...]
    keys: tuple[str, ...]
    numbers: Mapping[str, Any]

    @property
    def states(self) -> Mapping[str, Mapping[str, LazyTensor]]:
        """Those of the first set, which is the only one where no experts were spread."""
        return self.sets[0]


@dataclass(frozen=True)
class Training:
    """A run's state.

    Attributes:
        groups: the optimizer's parameter groups.
        frozen: parameters that weren't trained and that the run saved apart from the module, by name.
    """

    groups: tuple[Group, ...]
    frozen: Mapping[str, LazyTensor]

    @property
    def names(self) -> list[str]:
        """Every trained parameter."""
        return [n for g in self.groups for n in g.shapes]


def read_training(shards: Shards, rules: Rules) -> Training:
    """The state of a run that ZeRO partitioned.

    Raises:
        Refused: files are missing or mixed; a state that can't be cut anew (`zero-optimizer-state`), elastic states
            (`zero-elastic`), a layout that isn't the one that its settings give (`zero-layout`).
    """
    flats = listed_shapes(shards)
    settings = _settings(shards)
    homes = _homes(shards, settings, len(flats))
    keys, elements, numbers = _states(shards, flats)
    by_flat = {key: _by_flat(shards, key) for key in (MASTER, *elements)}
    counts = partition_counts(shards, len(flats))
    groups: list[Group] = []
    for group, home in zip(settings, homes, strict=True):
        shapes = {n: s for flat in home for n, s in flats[flat].items()}
        count = counts[home[0]] if home else shards.ranks
        _expect_known_layout(shards, rules, [flats[flat] for flat in home], len(groups), count)
        ordered = shapes if shards.stage == 3 else rules.original_order(shapes, count)
        groups.append(
            Group(
                ordered,
                group,
                _sets(by_flat, home, ordered),
                keys if home else (),
                {k: _one(shards, k, [v for flat in home for v in by[flat]]) for k, by in numbers.items()}
                if home
                else {},
            )
        )
    expect_one_save(shards)
    return Training(tuple(groups), frozen_tensors(shards) if shards.stage > 1 else {})


def _states(shards: Shards, flats: Sequence[Shapes]) -> tuple[tuple[str, ...], list[str], dict[str, list[list[Any]]]]:
    """Keys of the optimizer's state, those of them with a value for each element, and numbers by key and flat group."""
    if shards.universal:
        trained_tensors(shards)  # refuses names that no folder has, before any is looked into
        elements, held = universal_states(shards, [n for flat in flats for n in flat])
        numbers = {k: [[by_name[n] for n in flat] for flat in flats] for k, by_name in held.items()}
        return (*numbers, *elements), elements, numbers
    ranks = all_optimizers(shards)
    own = [_states_of_flats(shards, state, len(flats)) for state in ranks]
    keys, elements = _keys(shards, own, ranks[0])
    others = [k for k in keys if k not in elements]
    return keys, elements, {k: [[states[i][k] for states in own] for i in range(len(flats))] for k in others}


def _by_flat(shards: Shards, key: str) -> list[list[dict[str, LazyTensor]]]:
    """A state by flat group, and in it by set of experts."""
    if shards.stage < 3 and not shards.universal:
        return tensors_by_set(shards, key)
    named = trained_tensors(shards, key)
    return [[{n: named[n] for n in flat}] for flat in listed_shapes(shards)]


def _sets(
    by_flat: Mapping[str, Sequence[Sequence[Mapping[str, LazyTensor]]]], home: Sequence[int], names: Iterable[str]
) -> tuple[Mapping[str, Mapping[str, LazyTensor]], ...]:
    """The states of a parameter group, by set of experts."""
    count = len(by_flat[MASTER][home[0]]) if home else 1
    found = []
    for number in range(count):
        held = {k: {n: t for flat in home for n, t in flats[flat][number].items()} for k, flats in by_flat.items()}
        found.append({k: {n: _flat(named[n]) for n in names} for k, named in held.items()})
    return tuple(found)


def _flat(tensor: LazyTensor) -> LazyTensor:
    return tensors.reshape(tensor, (tensor.info.numel,))


def base_tree(shards: Shards, inner: Mapping[Any, Any]) -> Any:
    """The base optimizer's own state in an optimizer file's state."""
    return inner.get("optimizer_state_dict" if shards.stage == 3 else "base_optimizer_state")


def _settings(shards: Shards) -> list[Mapping[Any, Any]]:
    """The parameter groups as a tree of rank 0's file."""
    kept = kept_of(shards)
    base, file = base_tree(shards, kept.inner), None if shards.universal else kept.file
    if isinstance(base, list):
        raise shards.refuse(
            "zero-elastic",
            "elastic_checkpoint was on: the files hold no learning rates, and DeepSpeed itself can't resume from them "
            "with torch's optimizers",
            file=file,
            next="gather the weights, or save again with elastic_checkpoint off",
        )
    groups = base.get("param_groups") if isinstance(base, dict) else None
    if not isinstance(groups, list) or not all(
        isinstance(g, dict) and isinstance(g.get("params"), list) for g in groups
    ):
        raise shards.refuse("zero-malformed", "the optimizer's state has no param_groups", file=file)
    return groups


def _homes(shards: Shards, settings: Sequence[Mapping[Any, Any]], count: int) -> list[list[int]]:
    """The flat groups of each parameter group, by number; they are numbered one group after the other."""
    found = [[n for n in group["params"] if type(n) is int] for group in settings]
    if [n for home in found for n in home] != list(range(count)):
        text = f"param_shapes has {count} groups, and the optimizer's are {fold([str(h) for h in found])}"
        raise shards.refuse("zero-sizes", text, file=shards.files.optimizers.get(0))
    return found


def _states_of_flats(shards: Shards, inner: Mapping[Any, Any], count: int) -> list[Mapping[str, Any]]:
    """The optimizer's state of each flat group, in one rank's file."""
    base = base_tree(shards, inner)
    state = base.get("state") if isinstance(base, dict) else None
    held = state if isinstance(state, dict) else {}
    return [own if isinstance(own := held.get(i), dict) else {} for i in range(count)]


def _keys(
    shards: Shards, own: Sequence[Sequence[Mapping[str, Any]]], first: Mapping[Any, Any]
) -> tuple[tuple[str, ...], list[str]]:
    """Keys of the optimizer's state, and those of them that have a value for each element."""
    kinds = {tuple(state) for states in own for state in states}
    if len(kinds) > 1:
        text = f"parameter groups have different states: {fold([show(list(k)) for k in sorted(map(str, kinds))])}"
        raise _no_state(shards, text)
    masters = first.get("fp32_flat_groups", first.get("single_partition_of_fp32_groups"))
    lengths = [t.info.numel for t in masters] if isinstance(masters, list) else []
    keys = next(iter(kinds), ())
    elements = []
    for key in keys:
        values = [state[key] for state in own[0]]
        if all(_is_number(v) for v in values):
            continue
        for index, value in enumerate(values):
            shape = value.info.shape if isinstance(value, LazyTensor) else None
            least = lengths[index] if index < len(lengths) else 0
            if shape is None or len(shape) != 1 or not least <= shape[0] <= least + _most_padding(shards):
                raise _no_state(shards, f"`{show(key)}` is {_described(value)} for a partition of {least} elements")
        elements.append(key)
    return keys, elements


def _most_padding(shards: Shards) -> int:
    """Masters of stages 1 and 2 are saved without the padding that ends a group; a rank may hold nothing else."""
    return 2 * shards.ranks if shards.stage < 3 and shards.optimizer != BF16_OPTIMIZER else 0


def _described(value: Any) -> str:
    return f"of shape {list(value.info.shape)}" if isinstance(value, LazyTensor) else f"a {type(value).__name__}"


def _no_state(shards: Shards, what: str) -> Exception:
    return shards.refuse(
        "zero-optimizer-state",
        f"the optimizer's state can't be cut for other ranks: {what}; rows and columns (Adafactor), blocks (8-bit "
        "Adam) and the like belong to the ranks that they were made on",
        file=shards.files.optimizers[0],
        next="resume on as many ranks as before; or gather the weights and begin the optimizer anew",
    )


def _is_number(value: Any) -> bool:
    if isinstance(value, LazyTensor):
        return isinstance(value, Stored) and value.info.shape == ()
    return value is None or isinstance(value, bool | int | float)


def _one(shards: Shards, key: str, values: Sequence[Any]) -> Any:
    """What is one number for a group, the same in every rank's file and sub-group."""
    if len({_bits(shards, v) for v in values}) > 1:
        raise shards.refuse("zero-mixed", f"`{show(key)}` of the optimizer differs among ranks or sub-groups")
    return values[0]


def _bits(shards: Shards, value: Any) -> bytes | str:
    if not isinstance(value, Stored):
        return repr(value)
    fd = open_input(Path(value.file), root=shards.folder)
    try:
        return read_exact(fd, value.offset, value.info.nbytes, file=value.file)
    finally:
        os.close(fd)


def _expect_known_layout(shards: Shards, rules: Rules, flats: Sequence[Shapes], number: int, count: int) -> None:
    """The saved layout must be what the rules give for the ranks that saved it, or they wouldn't hold for others."""
    whole = {n: s for flat in flats for n, s in flat.items()}
    if shards.stage == 3:
        expected = [list(g) for g in sub_groups(whole, shards.ranks, rules.sub_group_size)]
        if expected != [list(f) for f in flats]:
            text = f"group {number} lies in {len(flats)} sub-groups, and sub_group_size {rules.sub_group_size} gives "
            raise shards.refuse("zero-layout", f"{text}{len(expected)} or others: this layout is not known")
        return
    state = common_state(shards) if shards.universal else shards.optim(0)
    paddings = state.get("param_alignment_paddings")
    layout = flat_layout(rules.original_order(whole, count), count, rules)
    if paddings is not None and paddings[number] != list(layout.gaps):
        text = f"group {number} has other paddings than parameter_alignment gives: this layout is not known"
        raise shards.refuse("zero-layout", text)
    if not shards.universal:
        _expect_saved_order(shards, rules.original_order(whole, count), number)


def _expect_saved_order(shards: Shards, ordered: Shapes, number: int) -> None:
    """Where the order was changed for round robin, each rank's own list has what it holds in the order before."""
    place = {n: i for i, n in enumerate(ordered)}
    for rank in range(shards.ranks):
        mappings = shards.optim(rank).get("param_slice_mappings")
        listed = mappings[number] if isinstance(mappings, list) and number < len(mappings) else None
        order = [place.get(n, -1) for n in listed] if isinstance(listed, dict) else []
        if order != sorted(order) or -1 in order:
            text = "the order of parameters is not the one that round_robin_gradients in the saved settings gives"
            raise shards.refuse("zero-layout", text, file=shards.files.optimizers[rank])
