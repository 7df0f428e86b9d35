"""What TRL's `AutoModelForCausalLMWithValueHead` loads from a folder. See probe_common."""

from __future__ import annotations

from typing import Any

from probe_common import Loaded, drop_prefix, last_attended, positions, run


def load(asked: Any) -> Loaded:
    """The wrapped causal model; its backbone's names are those of the model inside."""
    import torch

    try:
        from trl import AutoModelForCausalLMWithValueHead
    except ImportError:
        from trl.experimental.ppo import AutoModelForCausalLMWithValueHead

    model = AutoModelForCausalLMWithValueHead.from_pretrained(asked.folder, torch_dtype=getattr(torch, asked.dtype))
    return wrapped(model)


def wrapped(model: Any) -> Loaded:
    """A value-head wrapper, whoever loaded it."""
    state = {f"pretrained_model.{n}": t for n, t in model.pretrained_model.state_dict().items()}
    state |= {f"v_head.{n}": t for n, t in model.v_head.state_dict().items()}
    head = tuple(n for n in state if n.startswith("v_head."))

    def values(ids: Any, mask: Any) -> tuple[Any, list[int]]:
        found = model(input_ids=ids, attention_mask=mask, position_ids=positions(mask))[2]
        return found, list(range(ids.shape[1]))

    return Loaded(
        model,
        head,
        lambda ids, mask: last_attended(values(ids, mask)[0], mask),
        values,
        canonical=lambda name: drop_prefix(name, ("pretrained_model.",)),
        state=state,
    )


if __name__ == "__main__":
    run("trl", load, roles=("reward", "critic"))
