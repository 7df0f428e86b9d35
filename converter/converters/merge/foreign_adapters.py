"""Adapters of other software in PEFT's format but for some names: Tinker's output embedding and its stacked experts.

Tinker keeps one tensor for all experts of a layer, `experts.w1.lora_A` `[experts, r, in]`; of a factor that all experts
share there is one row. w1, w3 and w2 are gate, up and down.

Source: `merge_adapter_weights`, https://github.com/thinking-machines-lab/tinker-cookbook (`tinker_cookbook/weights`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from converter.core.tensors import nodes as tensors
from converter.core.tensors.nodes import LazyTensor
from converter.errors import Refused
from converter.text import show

_UNEMBED = re.compile(r"(?:^|(?<=\.))(?:model\.)?unembed_tokens(?=\.)", re.ASCII)
_STACKED = re.compile(r"(?P<module>.*\.experts)\.(?P<part>w[123])\.(?P<factor>lora_[AB])(?P<tail>\.weight)?", re.ASCII)
_PARTS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_AS_TINKER = ".block_sparse_moe.experts"
"""Ends the names of modules whose experts have Tinker's names on disk: Mixtral's, MiniMax's."""


def plain_names(held: Mapping[str, LazyTensor], where: str) -> tuple[dict[str, LazyTensor], tuple[str, ...]]:
    """The tensors under PEFT's names, one pair of factors for each expert, and what was done, in words.

    Raises:
        Refused: the stacks of one module do not fit each other (`adapter-shape`).
    """
    found: dict[str, LazyTensor] = {}
    said: dict[str, None] = {}
    counts = _experts(held, where)
    for key, tensor in held.items():
        match = _STACKED.fullmatch(key) if len(tensor.info.shape) == 3 else None
        if match is not None:
            said["stacked experts taken apart"] = None
            count, rows = counts[match["module"], match["part"]], tensor.info.shape[0]
            for expert in range(count):
                one = tensors.narrow(tensor, 0, expert if rows > 1 else 0, 1)
                leaf = match["part"] if match["module"].endswith(_AS_TINKER) else _PARTS[match["part"]]
                name = f"{match['module']}.{expert}.{leaf}.{match['factor']}{match['tail'] or ''}"
                found[name] = tensors.reshape(one, tensor.info.shape[1:])
            continue
        name = _UNEMBED.sub("lm_head", key) if "unembed_tokens" in key and "lora_" in key else key
        if name != key:
            said["`unembed_tokens` is lm_head"] = None
        found[name] = tensor
    return found, tuple(said)


def _experts(held: Mapping[str, LazyTensor], where: str) -> dict[tuple[str, str], int]:
    """The number of experts by module and part: a stack of one is shared by all."""
    sizes: dict[tuple[str, str], set[int]] = {}
    for key, tensor in held.items():
        match = _STACKED.fullmatch(key) if len(tensor.info.shape) == 3 else None
        if match is not None:
            sizes.setdefault((match["module"], match["part"]), set()).add(tensor.info.shape[0])
    for (module, part), found in sizes.items():
        if len(found - {1}) != 1:
            what = f"the factors of {show(module)}.{part} are of {sorted(found)} experts"
            raise Refused("adapter-shape", what, where=where, expected="one number of experts, or 1 where all share")
    return {key: max(found) for key, found in sizes.items()}
