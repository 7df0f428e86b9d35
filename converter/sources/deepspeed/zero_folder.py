"""The `zero` folder of a universal checkpoint: masters and moments, one folder a parameter, whole.

Stages 1 and 2 write dictionaries (`param` and how tensor-parallel ranks were joined), stage 3 plain flat tensors. Only
parameters that the optimizer held are taken from here: for all others, and for second names of shared ones, the folder
has the 16-bit weight widened, whole numbers made floats included. They are exact in the model file.

Under round robin the folder is wrong: ds_to_universal.py cuts the flat partitions in the optimizer's order, and they
are in another. Whether that happened can be inferred from the model file, see `scrambled`.

Source: https://github.com/deepspeedai/DeepSpeed/blob/v0.19.8/deepspeed/checkpoint/ds_to_universal.py
(`merge_tp_slices`, `merge_zero3_slices`), and `_link_all_hp_params` in deepspeed/runtime/zero/stage_1_and_2.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from converter.core.tensors import nodes as tensors
from converter.core.tensors.nodes import LazyTensor
from converter.sources.deepspeed.files import UNIVERSAL
from converter.sources.deepspeed.state import BF16_OPTIMIZER, Shards, common_state
from converter.sources.survey import file_names
from converter.text import fold, show

State = str
"""`master`, or a key of the optimizer's state of a parameter, as `exp_avg`."""
MASTER = "master"
Shapes = dict[str, tuple[int, ...]]
MASTER_FILE = "fp32.pt"


def universal_tensors(shards: Shards, groups: Sequence[Shapes], state: State) -> dict[str, LazyTensor]:
    """Every trained parameter's fp32 master, or one of its Adam moments, by name.

    Raises:
        Refused: the folder is scrambled (`zero-round-robin`), lacks parameters (`zero-parameter-missing`), or its
            sizes are not those of the model file (`zero-sizes`).
    """
    if (why := scrambled(shards, groups)) is not None:
        raise shards.refuse(
            "zero-round-robin",
            f"{why}: ds_to_universal.py then cuts parameters at the wrong places, and masters and moments in "
            f"`{UNIVERSAL}` belong to others",
            next="gather the rank files that it was made from, which are read in the right order; without --master "
            "this folder's weights are exact, in the training dtype",
        )
    listed = _folders(shards)
    names = [n for g in groups for n in g]
    file = _file(state)
    lost = [n for n in names if file not in listed.get(n, ()) or "exp_avg.pt" not in listed.get(n, ())]
    if lost:
        raise shards.refuse(
            "zero-parameter-missing",
            f"`{UNIVERSAL}` lacks {file if state != MASTER else 'the master'} of {len(lost)} trained "
            f"parameters: {fold(lost)}",
            next="gather the rank files that it was made from, or copy what is missing",
        )
    return {n: _parameter(shards, n, shape, state) for g in groups for n, shape in g.items()}


def _file(state: State) -> str:
    return MASTER_FILE if state == MASTER else f"{state}.pt"


def _folders(shards: Shards) -> dict[str, frozenset[str]]:
    """Files of each parameter's folder, by the parameter's name."""
    root = shards.folder / UNIVERSAL
    return {p.name: frozenset(file_names(p)) for p in root.iterdir() if p.is_dir()}


def _parameter(shards: Shards, name: str, shape: tuple[int, ...], state: State) -> LazyTensor:
    file = f"{UNIVERSAL}/{name}/{_file(state)}"
    value = shards.read(file)
    facts = value if isinstance(value, dict) else {}
    found = facts.get("param") if isinstance(value, dict) else value
    if facts.get("is_expert_param"):
        text = f"{show(name)} is a layer of experts in DeepSpeed's own form, which is not read"
        raise shards.refuse("zero-experts", text, file=file)
    if not isinstance(found, LazyTensor):
        raise shards.refuse("zero-malformed", "the file holds no parameter", file=file)
    if found.info.shape == shape or (len(found.info.shape) == 1 and found.info.numel == math.prod(shape)):
        return tensors.reshape(found, shape)
    text = f"{show(name)} is {list(found.info.shape)} here, and {list(shape)} in param_shapes"
    if facts.get("vocab_tensor"):
        text += ": rows that padded the vocabulary were cut off"
    raise shards.refuse("zero-sizes", text, file=file)


def scrambled(shards: Shards, groups: Sequence[Shapes]) -> str | None:
    """Why parameters in the `zero` folder are not what their names say, or None where they are.

    Round robin changes the order of a group with more parameters than ranks; DeepSpeed's own record of it is right only
    where parameters were padded for alignment.
    """
    if shards.stage == 3 or shards.ranks == 1 or shards.optimizer == BF16_OPTIMIZER:
        return None
    paddings = common_state(shards).get("param_alignment_paddings")
    moved = [
        group for index, group in enumerate(groups) if len(group) > shards.ranks and not _is_padded(paddings, index)
    ]
    config = shards.model().get("ds_config")
    if not isinstance(config, dict):
        module = shards.model().get("module")
        position = {n: i for i, n in enumerate(module)} if isinstance(module, dict) else {}
        order = [[position.get(n, -1) for n in group] for group in moved]
        if all(o == sorted(o) for o in order):
            return None
        return "the model file records no settings of DeepSpeed, and its order of parameters is that of round robin"
    zero = config.get("zero_optimization")
    if moved and isinstance(zero, dict) and zero.get("round_robin_gradients") is True:
        return f"the run had round_robin_gradients on {shards.ranks} ranks"
    return None


def _is_padded(paddings: Any, index: int) -> bool:
    own = paddings[index] if isinstance(paddings, list) and index < len(paddings) else None
    return isinstance(own, list) and any(own)
