"""The trees of a run's files for other ranks: those that were read, with what depends on the ranks put in anew."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from converter.core.formats import torch_tree
from converter.core.formats.pickle_values import Built, Global, Ordered
from converter.core.formats.torch_tree import changed, saved
from converter.core.tensors import nodes as tensors
from converter.core.tensors.nodes import LazyTensor
from converter.sources.deepspeed.experts import Ranks
from converter.sources.deepspeed.resharding.cuts import FlatLayout, Rules, flat_layout, piece, sub_groups
from converter.sources.deepspeed.resharding.training import Group, Training
from converter.sources.deepspeed.zero_folder import MASTER, Shapes

_FRAGMENT = Global("deepspeed.utils.tensor_fragment", "fragment_address")


def shapes_tree(shapes: Shapes) -> Ordered:
    """Names and shapes as DeepSpeed lists them."""
    return Ordered((n, torch_tree.size(s)) for n, s in shapes.items())


# Stage 3


def sub_groups_of(training: Training, ranks: int, rules: Rules) -> list[list[Shapes]]:
    """The sub-groups of each parameter group."""
    return [sub_groups(g.shapes, ranks, rules.sub_group_size) for g in training.groups]


def model_of_stage_3(model: Mapping[Any, Any], training: Training, rules: Rules, ranks: int, rank: int) -> Any:
    """A rank's model file of stage 3."""
    shapes = [shapes_tree(s) for group in sub_groups_of(training, ranks, rules) for s in group]
    values: dict[str, Any] = {"param_shapes": shapes, "dp_world_size": ranks}
    if training.frozen:
        flat = {n: tensors.reshape(t, (t.info.numel,)) for n, t in training.frozen.items()}
        values["frozen_param_fragments"] = Ordered((n, saved(piece(t, ranks, rank))) for n, t in flat.items())
    return changed(model, **values)


def optimizer_of_stage_3(outer: Mapping[Any, Any], training: Training, rules: Rules, ranks: int, rank: int) -> Any:
    """A rank's optimizer file of stage 3."""
    groups = sub_groups_of(training, ranks, rules)
    homes = [(group, names) for group, own in zip(training.groups, groups, strict=True) for names in own]

    def flat(group: Group, names: Shapes, key: str) -> LazyTensor:
        return tensors.concat([piece(group.states[key][n], ranks, rank) for n in names], 0)

    state = {i: _state(group, lambda key, g=group, n=names: flat(g, n, key)) for i, (group, names) in enumerate(homes)}
    inner = outer["optimizer_state_dict"]
    values = {
        "partition_count": ranks,
        "optimizer_state_dict": changed(
            inner["optimizer_state_dict"],
            state=state if training.groups[0].keys else {},
            param_groups=_param_groups(training, [len(own) for own in groups]),
        ),
        "fp32_flat_groups": [saved(flat(group, names, MASTER), requires_grad=True) for group, names in homes],
    }
    return changed(outer, optimizer_state_dict=changed(inner, **values))


# Stages 1 and 2


def layouts_of(training: Training, ranks: int, rules: Rules) -> list[FlatLayout]:
    """The flat layout of each parameter group: of experts, over the ranks that have the same ones."""
    return [flat_layout(g.shapes, ranks // len(g.sets), rules) for g in training.groups]


def model_of_stages_1_and_2(model: Mapping[Any, Any], training: Training, rules: Rules, ranks: int) -> Any:
    """The model file of stages 1 and 2; its module doesn't depend on the ranks."""
    layouts = layouts_of(training, ranks, rules)
    listed = model["param_shapes"]
    # Old versions have one mapping where there is one group, and runs with experts plain tuples.
    is_list = isinstance(listed, list)
    first = next((s for group in (listed if is_list else [listed]) for s in group.values()), None)
    made = tuple if type(first) is tuple else torch_tree.size
    pairs = zip(training.groups, layouts, strict=True)
    shapes = [Ordered((n, made(g.shapes[n])) for n in at.names) for g, at in pairs]
    values = {"param_shapes": shapes if is_list else shapes[0], "dp_world_size": ranks, **_of_experts(model, ranks)}
    return changed(model, **values)


def _of_experts(model: Mapping[Any, Any], ranks: int) -> dict[str, Any]:
    """What AutoEP records of its layers, with how many ranks have the same experts."""
    layers = model.get("ds_autoep_layers")
    if not layers:
        return {}
    dealt = [changed(at, expert_data_parallel_world_size=ranks // at["ep_size"]) for at in layers]
    info = model.get("universal_checkpoint_info")
    if not isinstance(info, dict) or "ds_autoep_layers" not in info:
        return {"ds_autoep_layers": dealt}
    return {"ds_autoep_layers": dealt, "universal_checkpoint_info": changed(info, ds_autoep_layers=dealt)}


@dataclass(frozen=True)
class _Home:
    """A rank's part of a parameter group.

    Attributes:
        states: those of the set of experts that the rank has.
        place: the rank's number among those that have them.
    """

    group: Group
    layout: FlatLayout
    states: Mapping[str, Mapping[str, LazyTensor]]
    place: int

    def flat(self, key: str, *, is_lean: bool = False) -> LazyTensor:
        """A state's stretch."""
        named = self.states[key]
        return self.layout.stretch(named, next(iter(named.values())).info, self.place, is_lean=is_lean)

    @property
    def fragments(self) -> Ordered:
        """What of each parameter is in it."""
        return _mapping(self.layout.fragments(list(self.group.shapes), self.place))


def _homes(training: Training, rules: Rules, ranks: int, rank: int) -> list[_Home]:
    found = []
    for group, layout in zip(training.groups, layouts_of(training, ranks, rules), strict=True):
        number, place = Ranks.dealt(ranks, len(group.sets), is_data_first=rules.is_data_first).place(rank)
        found.append(_Home(group, layout, group.sets[number], place))
    return found


def optimizer_of_stages_1_and_2(
    outer: Mapping[Any, Any], training: Training, rules: Rules, ranks: int, rank: int, *, is_lean: bool
) -> Any:
    """A rank's optimizer file of stages 1 and 2; lean: masters are saved without the padding at their end."""
    homes = _homes(training, rules, ranks, rank)
    inner = outer["optimizer_state_dict"]
    values: dict[str, Any] = {
        "base_optimizer_state": changed(
            inner["base_optimizer_state"],
            state={i: _state(h.group, h.flat) for i, h in enumerate(homes)} if training.groups[0].keys else {},
            param_groups=_param_groups(training, [1] * len(homes)),
        ),
        "single_partition_of_fp32_groups": [saved(h.flat(MASTER, is_lean=is_lean), requires_grad=True) for h in homes],
        "group_paddings": [h.layout.padding(h.place) for h in homes],
        "param_alignment_paddings": [list(h.layout.gaps) for h in homes],
        "partition_count": [ranks // len(h.group.sets) for h in homes],
        "param_slice_mappings": [h.fragments for h in homes],
    }
    return changed(outer, optimizer_state_dict=changed(inner, **{k: v for k, v in values.items() if k in inner}))


def _mapping(fragments: Mapping[str, tuple[int, int]]) -> Ordered:
    found = Ordered()
    for name, (start, count) in fragments.items():
        made = Built(_FRAGMENT, (), is_new=True)
        made.state = {"numel": count, "start": start}
        found[name] = made
    return found


def _state(group: Group, flat: Any) -> dict[str, Any]:
    """The optimizer's state of a flat group. A number that is a tensor gets its own: optimizers count up in place."""
    values: dict[str, Any] = {}
    for key in group.keys:
        value = group.numbers[key] if key in group.numbers else flat(key)
        values[key] = saved(value) if isinstance(value, LazyTensor) else value
    return values


def _param_groups(training: Training, counts: Sequence[int]) -> list[Any]:
    """The parameter groups, with their flat groups numbered one after the other."""
    numbers: Iterator[int] = iter(range(sum(counts)))
    pairs = zip(training.groups, counts, strict=True)
    return [changed(group.settings, params=[next(numbers) for _ in range(count)]) for group, count in pairs]
