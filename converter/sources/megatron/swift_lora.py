"""LoRA as ms-swift saves it: factors by rank, and rank and alpha among the arguments of its training script.

B of `linear_fc1` writes gate and up. megatron-core saves the matrix itself as all of gate, then all of up; of B
ms-swift saves the rows of each TP rank one after the other, which are that rank's gate, then its up.

Source: `LoraParallelLinear.sharded_state_dict` of mcore-bridge 1.6.5, tuners/lora.py, which puts the base alone into
megatron-core's order; `_generate_state_dict` of ms-swift 4.6.0, swift/megatron/utils/megatron_lm_utils.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping

from converter.core.checkpoint import SideFile
from converter.core.files.names import LORA_META
from converter.core.tensors.nodes import LazyTensor, concat, narrow
from converter.families.megatron.names import Value
from converter.sources.dcp.metadata import Metadata
from converter.text import show

_FC1 = re.compile(r".+\.linear_fc1\.lora_B\.\w+\.weight", re.ASCII)
_TP = "tensor_model_parallel_size"


def gates_first(
    read: Mapping[str, LazyTensor], metadata: Metadata, arguments: Mapping[str, Value] | None
) -> dict[str, LazyTensor]:
    """The same tensors, B of each `linear_fc1` with all rows of the gate before those of up.

    Raises:
        Refused: over how many ranks B was split is not known (`megatron-lora`).
    """
    found = dict(read)
    for key in (k for k in read if _FC1.fullmatch(k)):
        dim = len(read[key].info.shape) - 2
        ranks = len({chunk.offsets[dim] for chunk in metadata.tensors[key].chunks})
        if ranks > 1:
            _expect_ranks(key, ranks, metadata, arguments)
            found[key] = _joined(read[key], dim, ranks)
    return found


def _expect_ranks(key: str, ranks: int, metadata: Metadata, arguments: Mapping[str, Value] | None) -> None:
    told = (arguments or {}).get(_TP)
    if told != ranks:
        what = f"{show(key)} is in {ranks} parts, and {_TP} is {show(told) if told is not None else 'not recorded'}"
        raise metadata.refuse(
            "megatron-lora",
            f"{what}: in which order its rows are gate and up is not known",
            next="export the adapter with the trainer that wrote it (ms-swift: save_safetensors)",
        )


def _joined(tensor: LazyTensor, dim: int, ranks: int) -> LazyTensor:
    half = tensor.info.shape[dim] // ranks // 2
    return concat([narrow(tensor, dim, (2 * n + up) * half, half) for up in (0, 1) for n in range(ranks)], dim)


def recorded_lora(names: Iterable[str], arguments: Mapping[str, Value] | None) -> dict[str, SideFile]:
    """Rank and alpha of the adapters as verl's file of the same records them; nothing where there are none."""
    known = arguments or {}
    if known.get("lora_alpha") is None or not any(".lora_A." in n for n in names):
        return {}
    said = {"r": known.get("lora_rank"), "lora_alpha": known["lora_alpha"], "use_rslora": known.get("use_rslora")}
    return {LORA_META: SideFile(content=json.dumps(said).encode())}
