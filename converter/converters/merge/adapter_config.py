"""`adapter_config.json` as the merge understands it: every field is neutral, implemented or refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from converter.converters.merge.methods.finding import find_method, switches
from converter.converters.merge.methods.method import AdapterConfig
from converter.core.checkpoint import Checkpoint
from converter.errors import Refused
from converter.text import show


def read_adapter_config(adapter: Checkpoint, *, base_is_residual: bool = False) -> AdapterConfig:
    """The adapter's config, checked field by field.

    Raises:
        Refused: a PEFT method that is not registered (`peft-type-unsupported`), an unknown field that is set
            (`adapter-field-unknown`) or one whose meaning is not implemented (`adapter-field-unsupported`), a start
            that moved the base and can't be rebuilt (`adapter-base-moved`), a malformed value (`adapter-config`).
    """
    config = adapter.config
    where = f"{show(adapter.origin.asked)}/adapter_config.json"
    method = find_method(config, where)
    fields = {**switches(method), **method.all_fields}
    for key, value in config.items():
        known = fields.get(key)
        if known is not None and known.refused and value:
            what = f"`{key}` is set: {known.refused}"
            raise Refused("adapter-field-unsupported", what, where=where, facts={"field": key})
        if value and known is None:
            raise Refused(
                "adapter-field-unknown",
                f"`{show(key)}` is set and unknown, so what it means for a merge is too",
                where=where,
                got=show(value),
                facts={"field": show(key)},
                next="merge it with the PEFT version that wrote it, or report the field",
            )
    read: dict[str, Any] = {}
    for key, field in fields.items():
        value = None if field.moves_base and base_is_residual else config.get(key)
        read[key] = field.read(value, key, where)
    return AdapterConfig(method, read, _is_older(config))


def _is_older(config: Mapping[str, Any]) -> bool:
    """True for what PEFT before 0.14 saved whole: every field of that time, and none that 0.14 and 0.18 added.

    Source: https://github.com/huggingface/peft/blob/v0.13.2/src/peft/tuners/lora/config.py and v0.14.0 there
    """
    kept = {"layers_pattern", "layers_to_transform", "revision", "inference_mode"}
    return kept <= config.keys() and not {"exclude_modules", "peft_version"} & config.keys()
