"""Which weights are stored `[in, out]`: transformers' Conv1D, by family and module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

CONV1D_MODEL_TYPES = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "clvp_decoder"})
CONV1D_MODULES = frozenset({"c_attn", "q_attn", "c_proj", "c_fc"})
"""Families and modules that are transformers' Conv1D, stored `[in, out]`; everything else of these families is Linear.

Source: https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/pytorch_utils.py and its importers.
"""


def is_conv1d(name: str, config: Mapping[str, Any]) -> bool:
    """True for a tensor of a Conv1D: by its module's name, and by the family of the model or of the part it is in."""
    inner = {f"{key}.": part for key, part in config.items() if isinstance(part, Mapping)}
    own = [part for key, part in inner.items() if name.startswith(key)]
    family = any(str(part.get("model_type")) in CONV1D_MODEL_TYPES for part in own or [config, *inner.values()])
    return family and not CONV1D_MODULES.isdisjoint(name.split(".")[-2:-1])
