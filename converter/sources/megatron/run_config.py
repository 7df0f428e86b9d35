"""`run_config.yaml`, in which Megatron-Bridge and NeMo-RL record a run: a few of its values, read as data.

A file that isn't plain YAML says nothing.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from converter.core.checkpoint import SideFile
from converter.core.files.names import LORA_META
from converter.core.files.opening import Identity, identity, read_limited
from converter.core.files.strict_yaml import MAX_BYTES, read_values
from converter.errors import ConvertError
from converter.families.megatron.names import Value
from converter.sources.survey import file_names

RUN_CONFIG = "run_config.yaml"


_ARGUMENTS = {"layernorm_zero_centered_gamma": "apply_layernorm_1p", "rotary_interleaved": "rotary_interleaved"}
"""Values of its section on the model, by the names that Megatron-LM's arguments have for the same."""


@dataclass(frozen=True)
class Recorded:
    """What a run's config says.

    Attributes:
        files: rank and alpha of LoRA, as verl's file of the same records them.
        arguments: of the model, by the names of Megatron-LM's training script.
        inputs: the file that was read.
    """

    files: dict[str, SideFile] = field(default_factory=dict)
    arguments: dict[str, Value] = field(default_factory=dict)
    inputs: dict[str, Identity] = field(default_factory=dict)


def recorded(folder: Path) -> Recorded:
    """What the config in a folder says; nothing where there is none."""
    if RUN_CONFIG not in file_names(folder):
        return Recorded()
    path = folder / RUN_CONFIG
    try:
        value = read_values(read_limited(path, limit=MAX_BYTES, root=folder), file=str(path)).value
    except ConvertError:
        return Recorded()
    sections = value if isinstance(value, dict) else {}
    files: dict[str, SideFile] = {}
    if isinstance(lora := sections.get("peft"), dict):
        said = {"r": lora.get("dim"), "lora_alpha": lora.get("alpha")}
        files[LORA_META] = SideFile(content=json.dumps(said).encode())
    model = sections.get("model")
    given = {_ARGUMENTS[k]: v for k, v in model.items() if k in _ARGUMENTS} if isinstance(model, dict) else {}
    arguments = {k: v for k, v in given.items() if isinstance(v, bool)}
    return Recorded(files, dict(arguments), {str(path.absolute()): identity(path)})
