"""What transformers loads as sequence classification, with num_labels=1 as PPO trainers ask. See probe_common.

This is the loader of trainers that call `AutoModelForSequenceClassification` and nothing more.
"""

from __future__ import annotations

from typing import Any

from probe_common import Loaded, positions, run


def load(asked: Any) -> Loaded:
    """The classifier; rewards are its own logits, values those of the head over every position."""
    import torch
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(
        asked.folder, num_labels=1, dtype=getattr(torch, asked.dtype)
    )
    head = next(name for name in ("score", "classifier") if hasattr(model, name))
    names = tuple(n for n in model.state_dict() if n.startswith(f"{head}."))

    def rewards(ids: Any, mask: Any) -> Any:
        return model(ids, attention_mask=mask, position_ids=positions(mask)).logits

    def values(ids: Any, mask: Any) -> tuple[Any, list[int]]:
        backbone = getattr(model, model.base_model_prefix)
        hidden = backbone(ids, attention_mask=mask, position_ids=positions(mask)).last_hidden_state
        return getattr(model, head)(hidden).squeeze(-1), list(range(ids.shape[1]))

    return Loaded(model, names, rewards, values)


if __name__ == "__main__":
    run("transformers", load, roles=("reward", "critic"))
