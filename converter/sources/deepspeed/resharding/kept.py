"""What an optimizer's file keeps beside the ranks' partitions, as a tree: settings of the groups, loss scaler, steps.

Of a run it is rank 0's own file. Of a universal checkpoint it is put together again from `zero/optimizer_state.pt`, in
which ds_to_universal.py leaves what belongs to no rank, and parameter groups stand at the top.

Source: `_save_optimizer_state` of
https://github.com/deepspeedai/DeepSpeed/blob/v0.19.8/deepspeed/checkpoint/ds_to_universal.py
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from converter.core.formats.torch_container import Container
from converter.core.tensors.nodes import LazyTensor
from converter.sources.deepspeed.files import UNIVERSAL
from converter.sources.deepspeed.state import BF16_OPTIMIZER, Shards, all_optimizers
from converter.sources.deepspeed.zero_folder import MASTER_FILE
from converter.sources.survey import file_names

COMMON = f"{UNIVERSAL}/optimizer_state.pt"


@dataclass(frozen=True)
class Kept:
    """An optimizer file's tree.

    Attributes:
        tree: the dictionary in it.
        source: the file whose storages the tree refers to.
        file: the name that DeepSpeed gives it for rank 0.
    """

    tree: Mapping[Any, Any]
    source: Container
    file: str

    @property
    def inner(self) -> Any:
        """The optimizer's state in it."""
        return self.tree["optimizer_state_dict"]


def kept_of(shards: Shards) -> Kept:
    """What a run keeps.

    Raises:
        Refused: files are missing or mixed; a universal checkpoint without its common state (`zero-malformed`).
    """
    if not shards.universal:
        all_optimizers(shards)
        file = shards.files.optimizers[0]
        source = shards.tree(file)
        return Kept(source.pickle.value, source, file)
    if not (shards.folder / COMMON).is_file():
        text = f"`{COMMON}` is missing, in which the learning rates and steps are"
        raise shards.refuse("zero-malformed", text, next="copy it, or gather the weights")
    source = shards.tree(COMMON)
    common = source.pickle.value
    model = shards.tree(shards.model_file()).pickle.value
    inner: dict[Any, Any] = {}
    for key, value in common.items():
        if key != "param_groups":
            inner[key] = value
        if key == "clip_grad" and shards.stage < 3:  # there DeepSpeed has what the loader cuts itself
            inner["base_optimizer_state"] = {"state": {}, "param_groups": common.get("param_groups")}
            inner["single_partition_of_fp32_groups"] = None
    if shards.stage < 3:
        inner["param_slice_mappings"] = None
    if "optimizer_state_dict" not in inner and "base_optimizer_state" not in inner:
        raise shards.refuse("zero-malformed", f"`{COMMON}` is not of the stage that the model files are of")
    tree = {k: model.get(k) for k in ("ds_config", "ds_version")}
    return Kept({"optimizer_state_dict": inner, **tree}, source, f"{_prefix(shards)}zero_pp_rank_0_{_PLACE}")


_PLACE = "mp_rank_00_optim_states.pt"


def _prefix(shards: Shards) -> str:
    """`bf16_` of a run in bfloat16, where DeepSpeed looks for it."""
    config = shards.model().get("ds_config")
    sections = [config.get(k) for k in ("bf16", "bfloat16")] if isinstance(config, dict) else []
    is_bf16 = any(isinstance(s, dict) and s.get("enabled") is True for s in sections)
    return "bf16_" if is_bf16 or shards.optimizer == BF16_OPTIMIZER else ""


def universal_states(shards: Shards, names: list[str]) -> tuple[list[str], dict[str, dict[str, Any]]]:
    """Of a universal checkpoint: keys of states that have a value for each element, and numbers by key and parameter.

    Under ZeRO-3 the numbers are in the common state, once for all.

    Raises:
        Refused: parameters have different states (`zero-optimizer-state`).
    """
    held = {n: sorted(f for f in file_names(shards.folder / UNIVERSAL / n) if f.endswith(".pt")) for n in names}
    if len({tuple(files) for files in held.values()}) > 1:
        text = f"parameters in `{UNIVERSAL}` have files of different names"
        raise shards.refuse("zero-optimizer-state", text, next="gather the weights, and begin the optimizer anew")
    elements: list[str] = []
    numbers: dict[str, dict[str, Any]] = {}
    for file in next(iter(held.values()), []):
        if file == MASTER_FILE:
            continue
        key = file.removesuffix(".pt")
        values = {n: shards.read(f"{UNIVERSAL}/{n}/{file}") for n in names}
        if all(_is_number(v) for v in values.values()):
            numbers[key] = values
        else:
            elements.append(key)
    if shards.stage == 3:
        inner = shards.open(COMMON).get("optimizer_state_dict")
        state = inner.get("state") if isinstance(inner, dict) else None
        first: dict[Any, Any] = next(iter(state.values()), {}) if isinstance(state, dict) else {}
        numbers |= {k: dict.fromkeys(names, v) for k, v in first.items() if k not in elements and _is_number(v)}
    return elements, numbers


def _is_number(value: Any) -> bool:
    return value.info.shape == () if isinstance(value, LazyTensor) else isinstance(value, bool | int | float)
