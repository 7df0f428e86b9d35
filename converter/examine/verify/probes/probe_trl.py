"""What TRL's PPO loads from a folder, and what its `get_reward` makes of it. See probe_common.

TRL's PPO script calls `AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)` for both roles;
from 1.13 on TRL has no PPO, and `get_reward` is not there.
"""

from __future__ import annotations

from typing import Any

from probe_common import Loaded, run


def load(asked: Any) -> Loaded:
    """The classifier; rewards and values are those of `get_reward` with nothing as the prompt."""
    import torch
    from transformers import AutoModelForSequenceClassification

    try:
        from trl.experimental.utils import get_reward
    except ImportError:
        from trl.trainer.utils import get_reward

    model = AutoModelForSequenceClassification.from_pretrained(
        asked.folder, num_labels=1, dtype=getattr(torch, asked.dtype)
    )
    pad = model.config.pad_token_id
    if pad is None:
        raise ValueError("config.json has no pad_token_id, which get_reward needs")

    def scored(ids: Any, mask: Any) -> Any:
        return get_reward(model, ids.masked_fill(mask == 0, pad), pad, 0)

    def values(ids: Any, mask: Any) -> tuple[Any, list[int]]:
        return scored(ids, mask)[0].squeeze(-1), list(range(ids.shape[1]))

    names = tuple(n for n in model.state_dict() if n.startswith("score."))
    return Loaded(model, names, lambda ids, mask: scored(ids, mask)[1], values)


if __name__ == "__main__":
    run("trl", load, roles=("reward", "critic"))
