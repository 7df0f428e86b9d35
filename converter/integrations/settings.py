"""What to set in a training run so that its next save is whole, by the code that doctor gives the last one."""

from __future__ import annotations

from collections.abc import Mapping

_GATHER = (
    "set `stage3_gather_16bit_weights_on_model_save: true` under `zero_optimization` in DeepSpeed's config "
    "(accelerate: `zero3_save_16bit_model: true`) and save again"
)

_HEAD = (
    "save the head's whole weight from this process (LoRA on it: its weight after `merge_and_unload()`); from then on "
    'give LoRA `modules_to_save=["score"]`, by your head\'s name, and target modules without the head'
)

SETTINGS: Mapping[str, str] = {
    "adapter-empty": _GATHER,
    "head-base-lost": _HEAD,
    "head-missing": _HEAD,
    "no-tensors": _GATHER,
    "weights-missing": _GATHER,
    "zero3-empty-tensors": _GATHER,
}
"""Codes of findings that a setting of the training prevents, each with the setting."""


def what_to_set(code: str) -> str | None:
    """The setting that prevents a finding; None where none is known."""
    return SETTINGS.get(code)
