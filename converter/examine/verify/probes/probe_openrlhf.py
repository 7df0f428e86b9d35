"""What OpenRLHF loads from a folder: `get_llm_for_sequence_regression`, as its train_ppo calls it. See probe_common."""

from __future__ import annotations

import inspect
from typing import Any

from probe_common import Loaded, run, stand_in_for


def load(asked: Any) -> Loaded:
    """The reward or critic model, normalisation off, and what is in its `mean` and `std` buffers."""
    stood_in = stand_in_for("flash_attn", "ring_flash_attn", "deepspeed", "ray", "vllm", "torchdata", "bitsandbytes")
    import torch
    from openrlhf.models import get_llm_for_sequence_regression

    takes = inspect.signature(get_llm_for_sequence_regression).parameters
    how: dict[str, Any] = {"attn_implementation": "eager"} if "attn_implementation" in takes else {}
    if "param_dtype" in takes:
        how["param_dtype"] = "bf16"
        _allow_dtype(getattr(torch, asked.dtype))
    elif asked.dtype == "float32":
        how["bf16"] = False  # which means: as stored
    if asked.head_name:
        how["value_head_prefix"] = asked.head_name
    model = get_llm_for_sequence_regression(asked.folder, asked.role, normalize_reward=False, **how)
    prefix = model.value_head_prefix
    buffers = {name: getattr(model, name).double().tolist() for name in ("mean", "std")}
    facts = {"value_head_prefix": prefix, "buffers": buffers, "stood_in": stood_in}

    def rewards(ids: Any, mask: Any) -> Any:
        return model(ids, attention_mask=mask)

    def values(ids: Any, mask: Any) -> tuple[Any, list[int]]:
        columns = list(range(ids.shape[1] - 1))
        if "action_mask" in inspect.signature(model.forward).parameters:
            return model(ids, action_mask=mask[:, :-1], attention_mask=mask), columns
        return model(ids, num_actions=len(columns), attention_mask=mask), columns

    return Loaded(model, (f"{prefix}.weight",), rewards, values, facts=facts)


def _allow_dtype(dtype: Any) -> None:
    """OpenRLHF loads in bf16 or fp16 only; to compare values in fp32 its table of dtypes is made to say so."""
    from openrlhf.utils import utils

    utils.convert_to_torch_dtype = lambda name: dtype


if __name__ == "__main__":
    run("openrlhf", load, roles=("reward", "critic"))
