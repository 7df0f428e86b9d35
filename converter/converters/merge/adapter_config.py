"""`adapter_config.json` as the merge understands it: every field is neutral, implemented or refused by name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from converter.converters.merge.methods.finding import find_method, switches
from converter.converters.merge.methods.method import AdapterConfig, Release
from converter.core.checkpoint import Checkpoint
from converter.core.files.names import ADAPTER_CONFIG
from converter.diagnostic import Command, Steps, as_argument
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
        try:
            read[key] = field.read(value, key, where)
        except Refused as error:
            raise _with_converted(error, adapter) from None
    return AdapterConfig(method, read, *_release(config))


def _with_converted(error: Refused, adapter: Checkpoint) -> Refused:
    """Name the adapter over the base as it was, where the trainer left one beside the one over the base that it moved.

    Source: https://github.com/hiyouga/LLaMA-Factory/blob/v0.9.5/src/llamafactory/train/callbacks.py (`pissa_convert`)
    """
    beside = f"{adapter.origin.path}/pissa_converted"
    if error.code == "adapter-base-moved" and Path(beside, ADAPTER_CONFIG).is_file():
        asked = f"{adapter.origin.asked.rstrip('/')}/pissa_converted"
        merge = Command("merge-lora", (as_argument(asked), "OUT"))
        error.next = Steps("LLaMA-Factory converted it, beside it, into one over the base as it was: ", merge)
    return error


def _release(config: Mapping[str, Any]) -> tuple[Release | None, bool]:
    """The release of PEFT that saved the config, and whether that is inferred; None where nothing says it.

    PEFT writes its version since 0.18. What it saved whole without one is of 0.17 at the latest, and without
    `exclude_modules` of 0.13 at the latest.

    Source: https://github.com/huggingface/peft/blob/v0.13.2/src/peft/tuners/lora/config.py and v0.14.0 there
    """
    said = re.match(r"(\d{1,4})\.(\d{1,4})", str(config.get("peft_version") or ""), re.ASCII)
    if said is not None:
        return (int(said[1]), int(said[2])), False
    if "peft_version" in config or not {"layers_pattern", "layers_to_transform", "revision", "inference_mode"} <= set(
        config
    ):
        return None, False
    return ((0, 17) if "exclude_modules" in config else (0, 13)), True
