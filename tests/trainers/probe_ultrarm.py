"""What UltraRM's own class, as rewardbench ships it, loads from a folder: a source of the matrix, no trainer."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "converter" / "examine" / "verify" / "probes"))

from probe_common import Loaded, positions, run, stand_in_for


def load(asked: Any) -> Loaded:
    """The reward model; values are the head's over every position."""
    stand_in_for("fastchat", "bitsandbytes", "wandb", "trl", "tiktoken", "black", "flake8")
    from rewardbench.models.openbmb import LlamaRewardModel

    model = LlamaRewardModel.from_pretrained(asked.folder)

    def values(ids: Any, mask: Any) -> tuple[Any, list[int]]:
        hidden = model.model(ids, attention_mask=mask, position_ids=positions(mask))[0]
        return model.regression_head(hidden).squeeze(-1), list(range(ids.shape[1]))

    def rewards(ids: Any, mask: Any) -> Any:
        return model(ids, attention_mask=mask, position_ids=positions(mask)).squeeze(-1)

    return Loaded(model, ("regression_head.weight",), rewards, values)


if __name__ == "__main__":
    run("rewardbench", load, roles=("reward", "critic"))
