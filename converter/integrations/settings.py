"""What to set in a training run so that its next save is whole, by the code that doctor gives the last one."""

from __future__ import annotations

from collections.abc import Mapping

_GATHER = (
    "set `stage3_gather_16bit_weights_on_model_save: true` under `zero_optimization` in DeepSpeed's config "
    "(accelerate: `zero3_save_16bit_model: true`) and save again"
)

SETTINGS: Mapping[str, str] = {
    "adapter-empty": _GATHER,
    "no-tensors": _GATHER,
    "weights-missing": _GATHER,
    "zero3-empty-tensors": _GATHER,
}
"""Codes of findings that a setting of the training prevents, each with the setting."""


def what_to_set(code: str) -> str | None:
    """The setting that prevents a finding; None where none is known."""
    return SETTINGS.get(code)
