"""Layers for multi-token prediction: Megatron's `mtp.layers.K` and the layers after the last, as they are published.

Published models (DeepSeek-V3, GLM-4.5) keep such a layer with copies of the embedding and the output embedding, which
Megatron has once. transformers does not use these layers; servers do, for speculative decoding.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from converter.core.tensors.nodes import LazyTensor
from converter.families.megatron.rows import ROWS

MTP = "mtp."
"""What keys of such layers begin with."""
_OURS = re.compile(r"mtp\.layers\.(\d+)\.((?:transformer_layer|mtp_model_layer)\.)?(.+)", re.ASCII)
_OURS_NUMBERED = re.compile(r"decoder\.layers\.(\d+)\.(.+)", re.ASCII)
_THEIRS = re.compile(r"model\.layers\.(\d+)\.(.+)", re.ASCII)
_AROUND = frozenset({"enorm.weight", "hnorm.weight", "eh_proj.weight", "final_layernorm.weight"})
_COPIES = {"embed_tokens.weight": "model.embed_tokens.weight", "shared_head.head.weight": "lm_head.weight"}
_EMBEDDED = "decoder.layers.{N}.eh_proj.weight"


def count(config: Mapping[str, Any]) -> int:
    """How many such layers a config says that its model has, in a family whose rows have them."""
    is_known = any(row.ours == _EMBEDDED for row in ROWS.get(str(config.get("model_type")), ()))
    found = config.get("num_nextn_predict_layers")
    return found if is_known and type(found) is int and found > 0 else 0


def after_the_last(held: Mapping[str, LazyTensor], layers: int) -> dict[str, LazyTensor]:
    """Megatron's tensors with these layers numbered after the model's own."""
    found: dict[str, LazyTensor] = {}
    for key, tensor in held.items():
        match = _OURS.fullmatch(key)
        found[key if match is None else f"decoder.layers.{layers + int(match[1])}.{match[3]}"] = tensor
    return found


def as_mtp(held: Mapping[str, LazyTensor], layers: int) -> dict[str, LazyTensor]:
    """What `after_the_last` does, the other way."""
    found: dict[str, LazyTensor] = {}
    for key, tensor in held.items():
        match = _OURS_NUMBERED.fullmatch(key)
        if match is None or int(match[1]) < layers:
            found[key] = tensor
            continue
        inner = "" if match[2] in _AROUND else "transformer_layer."
        found[f"{MTP}layers.{int(match[1]) - layers}.{inner}{match[2]}"] = tensor
    return found


def with_copies(held: Mapping[str, LazyTensor], layers: int) -> dict[str, LazyTensor]:
    """Transformers' tensors with the copies of the embeddings that each such layer is published with."""
    found = dict(held)
    numbers = {int(m[1]) for n in held if (m := _THEIRS.fullmatch(n)) is not None and int(m[1]) >= layers}
    for number in sorted(numbers):
        for leaf, whole in _COPIES.items():
            if whole in held:
                found[f"model.layers.{number}.{leaf}"] = held[whole]
    return found


def copies(names: Mapping[str, LazyTensor], layers: int) -> dict[str, str]:
    """Names of such copies, and what each is a copy of."""
    found: dict[str, str] = {}
    for name in names:
        match = _THEIRS.fullmatch(name)
        if match is not None and int(match[1]) >= layers and match[2] in _COPIES:
            found[name] = _COPIES[match[2]]
    return found
