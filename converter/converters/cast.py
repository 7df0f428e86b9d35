"""`cast`: every floating-point tensor in one dtype, rounded once, and the config told so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from converter.core.checkpoint import Checkpoint
from converter.core.context import Context
from converter.core.tensors import nodes as tensors
from converter.core.tensors.dtypes import DType
from converter.core.tensors.nodes import LazyTensor
from converter.diagnostic import Again, Command
from converter.errors import Refused, UsageError
from converter.text import fold, show

TARGETS = (DType.BF16, DType.F16, DType.F32, DType.F64)


@dataclass(frozen=True)
class Cast:
    """Write floating-point tensors as `dtype`; a value computed in this run is rounded once, from full precision."""

    name: ClassVar[str] = "cast"

    dtype: str

    def __call__(self, checkpoint: Checkpoint, context: Context) -> Checkpoint:
        """The same checkpoint in another dtype; integer and boolean tensors stay.

        Raises:
            UsageError: not a dtype that weights are stored in (`unknown-dtype`).
            Refused: the checkpoint is quantised: its numbers mean nothing without their scales (`base-quantised`).
        """
        dtype = DType.parse(self.dtype)
        if dtype not in TARGETS:
            raise UsageError(
                "unknown-dtype", f"weights can't be cast to {dtype.value}", expected="bf16, fp16, fp32 or fp64"
            )
        narrow = [n for n, t in checkpoint.tensors.items() if t.info.dtype.is_float and t.info.dtype.bits < 16]
        if narrow or checkpoint.config.get("quantization_config"):
            raise Refused(
                "base-quantised",
                f"the checkpoint is quantised ({fold(narrow) or 'quantization_config'}); a cast would lose its scales",
                where=show(checkpoint.origin.asked),
                next=Again(
                    ("--dequantize",), otherwise=Command("reshard", (checkpoint.origin.asked, "OUT", "--dequantize"))
                ),
            )
        return checkpoint.replace(
            tensors=_cast(checkpoint.tensors, dtype),
            beside={file: _cast(found, dtype) for file, found in checkpoint.beside.items()},
            config=_with_dtype(checkpoint.config, dtype.torch_name),
        )


def _cast(found: Mapping[str, LazyTensor], dtype: DType) -> dict[str, LazyTensor]:
    return {n: tensors.recast(t, dtype) if t.info.dtype.is_float else t for n, t in found.items()}


def _with_dtype(config: Any, dtype: str) -> dict[str, Any]:
    """`dtype` (transformers 5) or `torch_dtype` (4), whichever the config uses, in nested configs too."""
    changed = {
        k: _with_dtype(v, dtype) if isinstance(v, dict) and k.endswith("config") else v for k, v in config.items()
    }
    for key in ("dtype", "torch_dtype"):
        if key in changed:
            changed[key] = dtype
    if "architectures" in changed and not {"dtype", "torch_dtype"} & set(changed):
        changed["dtype"] = dtype
    return changed
