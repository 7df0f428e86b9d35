"""Adapters of mlx-lm: `adapters.safetensors` beside an adapter_config.json that holds the options of the training run.

Source: `train_model`, https://github.com/ml-explore/mlx-lm/blob/v0.28.0/mlx_lm/lora.py
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from converter.errors import Refused
from converter.text import show

MLX_WEIGHTS = "adapters.safetensors"


def is_of_mlx(config: Mapping[str, Any]) -> bool:
    """True for a config that mlx-lm wrote."""
    return "peft_type" not in config and isinstance(config.get("lora_parameters"), Mapping)


def as_peft(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What a merge needs of mlx-lm's config, as fields of PEFT's; everything else is of the training run.

    Raises:
        Refused: not LoRA (`peft-type-unsupported`), or no rank or scale (`adapter-config`).
    """
    kind = config.get("fine_tune_type", "lora")
    if kind != "lora":
        what = f"mlx-lm's fine_tune_type {show(kind)} is not supported; lora is"
        raise Refused("peft-type-unsupported", what, where=where, next="fuse it with mlx-lm itself: mlx_lm.fuse")
    parameters = config["lora_parameters"]
    rank, scale = parameters.get("rank"), parameters.get("scale")
    if not _is_number(rank) or not _is_number(scale) or rank < 1:
        raise Refused(
            "adapter-config",
            "`lora_parameters` is malformed",
            where=where,
            expected="rank and scale, each a number",
            got=show(parameters),
            facts={"field": "lora_parameters"},
        )
    return {
        "peft_type": "MLX_LORA",
        "base_model_name_or_path": config.get("model"),
        "r": rank,
        "lora_alpha": scale * rank,
        "mlx_scale": scale,
        "task_type": "CAUSAL_LM",
    }


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
