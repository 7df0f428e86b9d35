"""An adapter under the name of a whole model's state, as FSDP leaves it."""

from __future__ import annotations

from pathlib import Path

from converter.core.files.names import ADAPTER_CONFIG, ADAPTER_PICKLED, ADAPTER_WEIGHTS
from converter.core.files.strict_json import MAX_JSON_BYTES, load_json
from converter.core.formats.weight_file import read_weights
from converter.errors import Refused
from converter.sources.survey import is_weights_of_model

FSDP = "pytorch_model_fsdp.bin"
"""What accelerate calls the state of a model under FSDP; of a PEFT model it holds the adapter alone.

Source: `save_fsdp_model`, https://github.com/huggingface/accelerate/blob/v1.10.0/src/accelerate/utils/fsdp_utils.py
"""


def holds_adapter_alone(root: Path, names: frozenset[str]) -> bool:
    """True where the folder's only weights are those of an adapter, under the name that FSDP's state has."""
    if ADAPTER_CONFIG not in names or FSDP not in names or not {ADAPTER_WEIGHTS, ADAPTER_PICKLED}.isdisjoint(names):
        return False
    if is_weights_of_model(names - {FSDP}):
        return False
    try:
        held = read_weights(root / FSDP, root=root, named=str(root.resolve() / FSDP)).tensors
        config = load_json(root / ADAPTER_CONFIG, limit=MAX_JSON_BYTES, root=root)
    except (Refused, OSError):
        return False
    listed = config.get("modules_to_save") if isinstance(config, dict) else None
    modules = {m for m in listed if isinstance(m, str)} if isinstance(listed, list) else set()
    others = [n for n in held if ".lora_" not in n and not n.endswith(".bias")]
    return any(".lora_" in n for n in held) and all(not modules.isdisjoint(n.split(".")) for n in others)
