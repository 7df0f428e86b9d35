"""`run_config.yaml`, in which Megatron-Bridge and NeMo-RL record a run: its section on LoRA, read as data."""

from __future__ import annotations

import json
from pathlib import Path

from converter.core.checkpoint import SideFile
from converter.core.files.names import LORA_META
from converter.core.files.opening import Identity, identity, read_limited
from converter.core.files.strict_yaml import MAX_BYTES, read_values
from converter.errors import ConvertError
from converter.sources.survey import file_names

RUN_CONFIG = "run_config.yaml"


def lora_recorded(folder: Path) -> tuple[dict[str, SideFile], dict[str, Identity]]:
    """Rank and alpha as verl's file of the same records them, and the file that says so; empty where none does.

    A file that isn't plain YAML says nothing: alpha is asked for then.
    """
    if RUN_CONFIG not in file_names(folder):
        return {}, {}
    path = folder / RUN_CONFIG
    try:
        value = read_values(read_limited(path, limit=MAX_BYTES, root=folder), file=str(path)).value
    except ConvertError:
        return {}, {}
    section = value.get("peft") if isinstance(value, dict) else None
    if not isinstance(section, dict):
        return {}, {}
    said = {"r": section.get("dim"), "lora_alpha": section.get("alpha")}
    return {LORA_META: SideFile(content=json.dumps(said).encode())}, {str(path.absolute()): identity(path)}
