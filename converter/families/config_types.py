"""Whether every field of a config is such as transformers takes: types and words, from a table, without transformers.

The formulas (`implied`) compute shapes from the fields that shapes depend on; a load also stops at a word that is no
activation, a rotary embedding of an unknown kind, a text where a number is asked for. What is not plainly sound here is
left to the installed transformers itself.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_DATA = Path(__file__).with_name("config_types.json")
_ROPES: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
"""Kinds of rotary embeddings with the numbers that each needs; others have fields of their own."""

_LAYERS = frozenset({"full_attention", "sliding_attention"})


def is_plain(config: Mapping[str, Any]) -> bool:
    """True where each field has a type and a word that transformers takes for this model type."""
    kind = config.get("model_type")
    fields = _table()["fields"].get(kind) if isinstance(kind, str) else None
    if fields is None:
        return False
    known = all(_is_taken(value, fields[key]) for key, value in config.items() if key in fields)
    ropes = all(_is_rope(config.get(key)) for key in ("rope_parameters", "rope_scaling"))
    return known and ropes and _are_layers(config.get("layer_types"), config.get("num_hidden_layers"))


def kinds() -> frozenset[str]:
    """The model types that the release knows, those of parts of models too."""
    return frozenset(_table()["kinds"])


@functools.cache
def _table() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(_DATA.read_text(encoding="utf-8"))
    return found


def _is_taken(value: Any, field: Mapping[str, Any]) -> bool:
    if isinstance(value, str) and "word" in field:
        activations = _table()["activations"]
        return value == field["word"] or (value in activations and field["word"] in activations)
    return _type_of(value) in field["types"]


def _type_of(value: Any) -> str:
    return "null" if value is None else type(value).__name__


def _is_rope(value: Any) -> bool:
    if value is None:
        return True
    if not isinstance(value, dict):
        return False
    kind = value.get("rope_type", value.get("type"))
    if kind is None and value and all(isinstance(v, dict) for v in value.values()):
        return all(map(_is_rope, value.values()))  # one for each kind of layer
    needs = _ROPES.get(kind if isinstance(kind, str) else "" if kind is not None else "default")
    if needs is None or not all(key in value for key in needs):
        return False
    given = [value[k] for k in value if k not in ("rope_type", "type")]
    return all(map(_is_number, given)) or (kind == "longrope" and all(_is_number(v) or _are_numbers(v) for v in given))


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and value > 0


def _are_numbers(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_number, value))


def _are_layers(value: Any, count: Any) -> bool:
    if value is None:
        return True
    return isinstance(value, list) and len(value) == count and all(isinstance(v, str) and v in _LAYERS for v in value)
