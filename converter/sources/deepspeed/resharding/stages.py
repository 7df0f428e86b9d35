"""A run's trees as of another stage, but for what depends on the ranks, which `trees` puts in.

ZeRO-1 and 2 keep the module whole in one file and the optimizer's state by parameter group; ZeRO-3 keeps empty places
in every rank's model file, frozen parameters as fragments, and the optimizer's state by sub-group.

Source: https://github.com/deepspeedai/DeepSpeed/blob/v0.19.8/deepspeed/runtime/zero/stage_1_and_2.py (`state_dict`),
stage3.py (`_rigid_state_dict`) and deepspeed/runtime/engine.py (`_common_checkpoint_state`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from converter.core.formats.pickle_values import Built, Global, Ordered
from converter.core.formats.torch_tree import changed, saved
from converter.core.tensors.dtypes import TensorInfo
from converter.core.tensors.nodes import Filled
from converter.sources.deepspeed.resharding.training import Training
from converter.sources.deepspeed.resharding.trees import shapes_tree
from converter.sources.deepspeed.state import Shards
from converter.sources.deepspeed.weights import WRAPPED, read_weights

_OF_3 = ("loss_scaler", "dynamic_loss_scale", "overflow")
_STAGE = Global("deepspeed.runtime.zero.config", "ZeroStageEnum")


def with_frozen(shards: Shards, training: Training) -> Training:
    """The state with the frozen parameters that only the module holds, as in stage 1, whose files don't list them."""
    if shards.stage == 3 or training.frozen:
        return training
    found = read_weights(shards)
    aliases = {n for group in found.shared for n in group[1:]}
    buffers = shards.model().get("buffer_names")
    others = {*training.names, *aliases, *(buffers if isinstance(buffers, list) else [])}
    frozen = {n: t for n, t in found.tensors.items() if n not in others}
    return dataclasses.replace(training, frozen=frozen)


def model_of_stage(shards: Shards, training: Training, model: Mapping[Any, Any], stage: int) -> Any:
    """A model file's tree; of stage 0 too, but for the optimizer's state that is in it there."""
    values: dict[str, Any] = {"param_shapes": [], "ds_config": _config(model.get("ds_config"), stage)}
    if stage == 3:
        module = _emptied(shards, training, model)
    else:
        module = _whole(shards, training, model) if shards.stage == 3 else model["module"]
    values["module"] = module
    frozen = training.frozen if stage > 1 else {}
    shapes = {n: t.info.shape for n, t in frozen.items()}
    values["frozen_param_shapes"] = shapes_tree(shapes) if frozen else None
    whole = Ordered((n, saved(t)) for n, t in frozen.items())
    values["frozen_param_fragments"] = whole if frozen else None
    return changed(model, **values)


def optimizer_of_stage(outer: Mapping[Any, Any], stage: int) -> Any:
    """An optimizer file's tree, with places for what depends on the ranks.

    The clipping of gradients isn't in files of stage 3; where it is missing DeepSpeed takes the run's own.
    """
    inner = outer["optimizer_state_dict"]
    number = {"zero_stage": Built(_STAGE, (stage,))}
    kept = {k: inner[k] for k in _OF_3 if k in inner}
    own: Any
    if stage == 3:
        own = {**number, **kept, "partition_count": None, "optimizer_state_dict": {}, "fp32_flat_groups": None}
    elif "single_partition_of_fp32_groups" in inner:
        own = changed(inner, **number)
    else:
        places = ("group_paddings", "param_alignment_paddings", "partition_count")
        own = {**kept, "base_optimizer_state": {}, "single_partition_of_fp32_groups": None, **number}
        own |= dict.fromkeys(places) | {"ds_version": outer.get("ds_version"), "param_slice_mappings": None}
    return changed(outer, ds_config=_config(outer.get("ds_config"), stage), optimizer_state_dict=own)


def _config(config: Any, stage: int) -> Any:
    """The settings with the new stage."""
    zero = config.get("zero_optimization") if isinstance(config, dict) else None
    return changed(config, zero_optimization=changed(zero, stage=stage)) if isinstance(zero, dict) else config


def _emptied(shards: Shards, training: Training, model: Mapping[Any, Any]) -> Any:
    """The module with empty places for its parameters, and its buffers."""
    known = _parameters(training, model)
    held = shards.model()["module"]
    like = {k: held[k].info.dtype for k in model["module"] if _parameter(k, known) in known}
    return changed(model["module"], **{k: saved(Filled(TensorInfo(dtype, (0,)), 0)) for k, dtype in like.items()})


def _parameters(training: Training, model: Mapping[Any, Any]) -> set[str]:
    """Names of all parameters, second names of shared ones included."""
    return {*training.names, *training.frozen, *(model.get("shared_params") or {})}


def _parameter(key: str, known: set[str]) -> str:
    """A module's entry by its parameter's name; see `weights.WRAPPED`."""
    return WRAPPED + key if key not in known and WRAPPED + key in known else key


def _whole(shards: Shards, training: Training, model: Mapping[Any, Any]) -> Any:
    """The module with its parameters whole, in the dtype of training; those that no file holds are left out."""
    weights = read_weights(shards).tensors
    made: Any = changed(model["module"])
    shared = model.get("shared_params") or {}
    known = _parameters(training, model)
    one: dict[str, Built] = {}
    for key in model["module"]:
        name = _parameter(key, known)
        if name in known:
            made[key] = one.setdefault(shared.get(name, name), saved(weights[name]))
        elif key in weights and weights[key].info.shape == (0,):
            del made[key]
    return made
