"""A ZeRO run's state as DeepSpeed saves it without ZeRO: one file, which loads on any number of ranks.

The optimizer's state is torch's own, by the parameters' numbers in the optimizer's order. In 16 bits DeepSpeed wraps it
with the masters and the loss scale: flat by group for its FusedAdam, a tensor a parameter for all others.

Source: `state_dict` of
https://github.com/deepspeedai/DeepSpeed/blob/v0.19.8/deepspeed/runtime/fp16/unfused_optimizer.py and fused_optimizer.py
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from converter.core.formats.pickle_values import Built
from converter.core.formats.torch_tree import changed, saved
from converter.core.tensors import nodes as tensors
from converter.core.tensors.dtypes import DType
from converter.core.tensors.nodes import LazyTensor
from converter.sources.deepspeed.resharding.kept import kept_of
from converter.sources.deepspeed.resharding.training import Group, Training
from converter.sources.deepspeed.state import Shards
from converter.sources.deepspeed.weights import training_dtype
from converter.sources.deepspeed.zero_folder import MASTER

_OF_DYNAMIC = ("last_overflow_iter", "scale_factor", "scale_window")


def with_optimizer(shards: Shards, training: Training, model: Mapping[Any, Any], ranks: int) -> Any:
    """The model file's tree with the optimizer's state in it."""
    dtype = training_dtype(shards, None)
    is_fused = dtype is not DType.F32 and _is_fused(training.groups[0].settings)
    state = _torch_state(training, is_flat=is_fused)
    nothing = dict.fromkeys(("param_shapes", "frozen_param_shapes", "frozen_param_fragments", "shared_params"))
    values: dict[str, Any] = {**nothing, "dp_world_size": ranks}
    if dtype is DType.F32:
        return changed(model, **values, optimizer=state)
    scale = _loss_scale(shards, model, is_fp16=dtype is DType.F16)
    groups = training.groups
    if is_fused:
        kept = kept_of(shards).inner
        wrapped = {**(scale if dtype is DType.F16 else {}), "optimizer_state_dict": state}
        wrapped["fp32_groups_flat"] = [saved(_flat(g, MASTER), requires_grad=True) for g in groups]
        wrapped["clip_grad"] = kept.get("clip_grad", _clipping(model))
    else:
        wrapped = {**scale, "optimizer_state_dict": state}
        wrapped["fp32_groups"] = [[saved(_shaped(g, n, MASTER), requires_grad=True) for n in g.shapes] for g in groups]
    return changed(model, **values, optimizer=wrapped)


def _is_fused(settings: Mapping[Any, Any]) -> bool:
    """Whether a group's settings are those of DeepSpeed's or apex's FusedAdam."""
    return "bias_correction" in settings and "amsgrad" not in settings


def _torch_state(training: Training, *, is_flat: bool) -> dict[str, Any]:
    state: dict[int, Any] = {}
    groups = []
    for group in training.groups:
        names: list[str | None] = [None] if is_flat else list(group.shapes)
        numbers = list(range(len(state), len(state) + len(names)))
        for number, name in zip(numbers, names, strict=True):
            state[number] = {k: _value(group, name, k) for k in group.keys}
        groups.append(changed(group.settings, params=numbers))
    return {"state": state if training.groups[0].keys else {}, "param_groups": groups}


def _value(group: Group, name: str | None, key: str) -> Any:
    if key in group.numbers:
        number = group.numbers[key]
        return saved(number) if isinstance(number, LazyTensor) else number
    return saved(_flat(group, key) if name is None else _shaped(group, name, key))


def _flat(group: Group, key: str) -> LazyTensor:
    return tensors.concat([group.states[key][n] for n in group.shapes], 0)


def _shaped(group: Group, name: str, key: str) -> LazyTensor:
    return tensors.reshape(group.states[key][name], tuple(group.shapes[name]))


def _loss_scale(shards: Shards, model: Mapping[Any, Any], *, is_fp16: bool) -> dict[str, Any]:
    """What is recorded of the loss scale; in bfloat16 there is none, and it is 1."""
    steps = model.get("global_steps")
    plain = {"dynamic_loss_scale": False, "cur_scale": 1.0, "cur_iter": steps}
    scaler = kept_of(shards).inner.get("loss_scaler") if is_fp16 else None
    held = scaler.state if isinstance(scaler, Built) else None
    if not isinstance(held, dict):
        return plain
    is_dynamic = held.get("dynamic") is True
    found = {
        "dynamic_loss_scale": is_dynamic,
        "cur_scale": held.get("cur_scale"),
        "cur_iter": held.get("cur_iter", steps),
    }
    return found | ({k: held.get(k) for k in _OF_DYNAMIC} if is_dynamic else {})


def _clipping(model: Mapping[Any, Any]) -> Any:
    config = model.get("ds_config")
    return config.get("gradient_clipping", 0.0) if isinstance(config, dict) else 0.0
