"""Pairs under Tinker's names: its output embedding, and one stack of factors for all experts of a layer.

Source: `merge_adapter_weights`, https://github.com/thinking-machines-lab/tinker-cookbook (`tinker_cookbook/weights`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from converter.converters.adapters.pairs import Pair
from converter.core.tensors import nodes as tensors
from converter.core.tensors.dtypes import TensorInfo
from converter.core.tensors.nodes import LazyTensor
from converter.errors import Refused
from converter.families.words import LORA_PAIR, PEFT_PREFIX
from converter.text import show

_EXPERT = re.compile(r"^(?P<module>.+\.experts)\.(?P<number>\d+)\.(?P<leaf>\w+)$", re.ASCII)
_PARTS = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3", "w1": "w1", "w2": "w2", "w3": "w3"}
_MODULES = {"lm_head": "model.unembed_tokens"}


def as_tinker(pairs: Sequence[Pair], where: str) -> dict[str, LazyTensor]:
    """The pairs, all of one rank and one scale; an expert without a pair has zeros.

    Raises:
        Refused: experts whose modules have other names than Tinker's three (`adapter-not-for-target`).
    """
    out: dict[str, LazyTensor] = {}
    stacks: dict[str, dict[int, Pair]] = {}
    for pair in pairs:
        match = _EXPERT.match(pair.module)
        if match is None:
            module = _MODULES.get(pair.module, pair.module)
            for part, factor in zip(LORA_PAIR, (pair.a, pair.b), strict=True):
                out[f"{PEFT_PREFIX}{module}.{part}.weight"] = factor
        elif match["leaf"] not in _PARTS:
            what = f"Tinker has w1, w2 and w3 of an expert, and no place for {show(pair.module)}"
            raise Refused("adapter-not-for-target", what, where=where)
        else:
            stacks.setdefault(f"{match['module']}.{_PARTS[match['leaf']]}", {})[int(match["number"])] = pair
    count = 1 + max((number for held in stacks.values() for number in held), default=-1)
    for name, held in stacks.items():
        for part in LORA_PAIR:
            out[f"{PEFT_PREFIX}{name}.{part}.weight"] = _stacked(held, part, count)
    return out


def _stacked(held: Mapping[int, Pair], part: str, count: int) -> LazyTensor:
    found = {number: pair.a if part == LORA_PAIR[0] else pair.b for number, pair in held.items()}
    like = next(iter(found.values())).info
    empty = tensors.Filled(TensorInfo(like.dtype, like.shape), 0)
    return tensors.concat([tensors.reshape(found.get(n, empty), (1, *like.shape)) for n in range(count)], 0)
