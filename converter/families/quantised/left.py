"""Whether a config says that weights are quantised which are whole: loaders look for scales that are not there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from converter.core.tensors.dtypes import TensorInfo

LEFT = "quantisation-left"

_WHOLE = ("F16", "BF16", "F32", "F64")
_MARKS = ("scale", "absmax", "qweight", "SCB", "quant_state", "_blocks", "zero_point", "qzeros", "packed")
_MADE_BY_THE_LOAD = ("bitsandbytes",)
"""Methods that quantise whole weights as they are loaded, though config.json alone asks for it."""


def is_left(config: Mapping[str, Any], infos: Mapping[str, TensorInfo]) -> bool:
    """True where config.json has a `quantization_config` of a method that stores other tensors than these."""
    method = config.get("quantization_config")
    if not isinstance(method, dict) or not infos or method.get("quant_method") in _MADE_BY_THE_LOAD:
        return False
    if method.get("quantization_mode") == "online" or method.get("linear_class") == "autobitlinear":
        return False  # BitNet's masters, which its layers round in each step
    kinds = {i.dtype.value for i in infos.values() if i.numel and len(i.shape) > 1}
    return all(k.startswith(_WHOLE) for k in kinds) and not any(m in n for n in infos for m in _MARKS)
