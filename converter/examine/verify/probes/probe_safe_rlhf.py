"""What safe-rlhf's score model loads from a folder: `LlamaForScore`, as rewardbench ships it. See probe_common."""

from __future__ import annotations

import inspect
from typing import Any

from probe_common import Loaded, run, stand_in_for


def load(asked: Any) -> Loaded:
    """The Llama score model; rewards are end scores, values scores of every position."""
    stood_in = stand_in_for("fastchat", "bitsandbytes", "wandb", "trl", "tiktoken", "black", "flake8")
    import torch
    from rewardbench.models.beaver import LlamaForScore

    model = LlamaForScore.from_pretrained(asked.folder, torch_dtype=getattr(torch, asked.dtype))
    facts = {"stood_in": stood_in, "do_normalize": bool(getattr(model, "do_normalize", False))}
    names = tuple(n for n in model.state_dict() if n.startswith(("score_head.", "normalizer.")))
    takes = inspect.signature(model.forward).parameters

    def scored(ids: Any, mask: Any) -> Any:
        more = {"position_ids": None} if "position_ids" in takes else {}
        return model(ids, attention_mask=mask, **more)

    def values(ids: Any, mask: Any) -> tuple[Any, list[int]]:
        return scored(ids, mask).scores.squeeze(-1), list(range(ids.shape[1]))

    return Loaded(model, names, lambda ids, mask: scored(ids, mask).end_scores.squeeze(-1), values, facts=facts)


if __name__ == "__main__":
    run("rewardbench", load, roles=("reward", "critic"))
