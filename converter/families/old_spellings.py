"""Config keys of transformers 4 for what transformers 5 renamed: a table, and what each entry is inferred from.

transformers 5 reads the old spellings and writes the new ones only; transformers 4 reads the old ones and passes over
what it doesn't know, so a model keeps loading and computes something else: theta falls to 10000, whole heads rotate
where a part should. With both spellings in one config all versions compute the same.

Source: what `to_dict` of the config classes of transformers 4.57.6 has and that of 5.23.0 has not, for every model type
that both know; and `convert_rope_params_to_dict`,
https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/modeling_rope_utils.py
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from converter.core.context import Context
from converter.errors import Refused
from converter.text import show

_ROPE_KEYS: Mapping[str, tuple[str, str]] = {
    "gpt_neox": ("rotary_emb_base", "rotary_pct"),
    "gpt_neox_japanese": ("rotary_emb_base", "rotary_pct"),
}
"""Model types whose theta and rotated part have names of their own."""

_LAYER_KEYS: Mapping[str, tuple[str, str | None]] = {
    "gemma3_text": ("rope_theta", "rope_local_base_freq"),
    "gemma3n_text": ("rope_theta", "rope_local_base_freq"),
    "modernbert": ("global_rope_theta", "local_rope_theta"),
    "modernbert-decoder": ("global_rope_theta", "local_rope_theta"),
    "olmo3": ("rope_theta", None),
}
"""Names of the theta of full and of sliding attention; None: both layers share the first."""

_RENAMED: Mapping[str, Mapping[str, str]] = {
    "qwen3_moe": {"num_experts": "num_local_experts"},
    "qwen3_vl_moe_text": {"num_experts": "num_local_experts"},
    "flaubert": {"pad_index": "pad_token_id", "bos_index": "bos_token_id", "eos_index": "eos_token_id"},
    "xlm": {"pad_index": "pad_token_id", "bos_index": "bos_token_id", "eos_index": "eos_token_id"},
}
"""Old keys with the new ones that hold their values."""

_MROPE = frozenset({"qwen2_vl", "qwen2_vl_text", "qwen2_5_vl", "qwen2_5_vl_text"})
_MOST_DEPTH = 8
_OTHER_THETA = frozenset({
    "apertus", "bitnet", "blt", "csm", "dinov3_vit", "ernie4_5", "ernie4_5_moe", "evolla", "falcon_h1", "flex_olmo",
    "fuyu", "gemma3_text", "gemma3n_text", "gpt_oss", "helium", "kyutai_speech_to_text", "lfm2", "llama4_text",
    "longcat_flash", "minimax", "mixtral", "persimmon", "phimoe", "qwen2_5_vl_text", "qwen2_vl_text",
    "qwen3_vl_moe_text", "qwen3_vl_text", "smollm3",
})  # fmt: skip
"""Model types of transformers 4 whose theta is not 10000 where none is given."""


def with_old_spellings(config: Mapping[str, Any], context: Context, *, asked: str, depth: int = 0) -> dict[str, Any]:
    """The config, and the configs inside it, with the old spelling beside each new one.

    Raises:
        Refused: nothing says how transformers 4 would write it (`spelling-unknown`), without consent.
    """
    new = dict(config)
    for key, value in config.items():
        if isinstance(value, dict) and key != "rope_parameters" and depth < _MOST_DEPTH:
            new[key] = with_old_spellings(value, context, asked=asked, depth=depth + 1)
    kind = str(config.get("model_type", ""))
    rope = config.get("rope_parameters")
    if isinstance(rope, dict):
        added = _by_layer(kind, rope, config) if any(isinstance(v, dict) for v in rope.values()) else _flat(kind, rope)
        if added is None:
            what = (
                f"rope_parameters of {show(kind) or 'this model'} have no spelling that transformers 4 is known to read"
            )
            context.consent(Refused("spelling-unknown", what, where=show(asked), got=show(rope)))
        new |= {k: v for k, v in (added or {}).items() if k not in config}
    for old, renamed in _RENAMED.get(kind, {}).items():
        if renamed in config and old not in config:
            new[old] = config[renamed]
    if "dtype" in config and "torch_dtype" not in config:
        new["torch_dtype"] = config["dtype"]
    return new


def missing_spellings(config: Mapping[str, Any], asked: str) -> list[str]:
    """Old keys that matter and are not there, with their values: those that are transformers 4's defaults do not.

    Raises:
        Refused: nothing says how transformers 4 would write them (`spelling-unknown`).
    """
    return [f"{key} {show(value)}" for key, value in _added(config, with_old_spellings(config, Context(), asked=asked))]


def _added(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    kind = str(before.get("model_type", ""))
    for key, value in after.items():
        if key == "torch_dtype":
            continue
        if key not in before and not (key == "rope_theta" and value == 10000 and kind not in _OTHER_THETA):
            yield key, value
        elif isinstance(before.get(key), dict) and isinstance(value, dict):
            yield from _added(before[key], value)


def _flat(kind: str, rope: Mapping[str, Any]) -> dict[str, Any]:
    """One set of parameters for all layers."""
    theta_key, part_key = _ROPE_KEYS.get(kind, ("rope_theta", "partial_rotary_factor"))
    found: dict[str, Any] = {}
    if _is_number(rope.get("rope_theta")):
        found[theta_key] = rope["rope_theta"]
    if _is_number(rope.get("partial_rotary_factor")):
        found[part_key] = rope["partial_rotary_factor"]
    return found | _scaling(kind, rope)


def _scaling(kind: str, rope: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_scaling`, where there is more to say than the default."""
    rest = {k: v for k, v in rope.items() if k not in ("rope_theta", "partial_rotary_factor")}
    if rest.get("rope_type", "default") == "default" and not set(rest) - {"rope_type", "type"}:
        return {}
    if kind in _MROPE and "mrope_section" in rest:
        rest["type"] = "mrope"
    return {"rope_scaling": rest}


def _by_layer(kind: str, rope: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Parameters for full and for sliding attention; None where transformers 4 has no such form."""
    full, sliding = rope.get("full_attention"), rope.get("sliding_attention")
    keys = _LAYER_KEYS.get(kind)
    if keys is None or not isinstance(full, dict) or not isinstance(sliding, dict) or len(rope) != 2:
        return None
    if _scaling(kind, sliding) or not _is_number(full.get("rope_theta")) or not _is_number(sliding.get("rope_theta")):
        return None
    found = {keys[0]: full["rope_theta"]}
    if keys[1] is not None:
        found[keys[1]] = sliding["rope_theta"]
    elif sliding["rope_theta"] != full["rope_theta"]:
        return None
    if kind.startswith("modernbert"):
        every = _every(config.get("layer_types"))
        if every is None or _scaling(kind, full):
            return None
        found["global_attn_every_n_layers"] = every
    return found | _scaling(kind, full)


def _every(layers: object) -> int | None:
    """N where every Nth layer has full attention, from the first on; None where they follow no such rule."""
    if not isinstance(layers, list) or not layers:
        return None
    full = [n for n, layer in enumerate(layers) if layer == "full_attention"]
    every = full[1] - full[0] if len(full) > 1 else len(layers)
    return every if full == list(range(0, len(layers), every)) else None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
