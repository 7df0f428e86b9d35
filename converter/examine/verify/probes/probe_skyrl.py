"""What SkyRL loads from a folder: `get_llm_for_sequence_regression` of its model wrapper. See probe_common."""

from __future__ import annotations

import sys
import typing
from typing import Any

from probe_common import Loaded, run, stand_in_for


def load(asked: Any) -> Loaded:
    """The critic, with the head's name that is SkyRL's default: config.json is not asked for it."""
    stood_in = stand_in_for("flash_attn", "ray", "vllm", "torchdata", "bitsandbytes", "sglang", "deepspeed")
    if sys.version_info < (3, 12):
        # SkyRL wants Python 3.12, for pydantic models of typed dicts that its loader doesn't touch.
        import typing_extensions

        typing.TypedDict = typing_extensions.TypedDict
    from skyrl.backends.skyrl_train.workers.model_wrapper import get_llm_for_sequence_regression

    model = get_llm_for_sequence_regression(asked.folder, "critic", bf16=asked.dtype == "bfloat16")

    def values(ids: Any, mask: Any) -> tuple[Any, list[int]]:
        columns = list(range(ids.shape[1] - 1))
        return model(ids, num_actions=len(columns), attention_mask=mask), columns

    prefix = model.value_head_prefix
    facts = {"value_head_prefix": prefix, "stood_in": stood_in}
    return Loaded(model, (f"{prefix}.weight",), values=values, facts=facts)


if __name__ == "__main__":
    run("skyrl", load, roles=("critic",))
