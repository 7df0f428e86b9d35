"""LoRA over torch's own attention module, whose projections are no modules: `in_proj_weight`, and `out_proj` inside.

PEFT wraps the module: its factors are of `in_proj_weight` `[3 * width, width]`, and those under `base_layer.out_proj`
of the output. It adds the latter twice, by itself and through the layer that it has made of `out_proj`, in the
forward pass and in the merge alike: that is what was trained, so it is what is merged.

Here the base's tensors get the names of a module while adapters are merged, and their own again afterwards.

Source: `MultiheadAttention`, https://github.com/huggingface/peft/blob/v0.21.2/src/peft/tuners/lora/layer.py
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from converter.core.checkpoint import Checkpoint
from converter.core.tensors.dtypes import DType
from converter.errors import Refused
from converter.text import show

_INNER = re.compile(r"^(?P<module>.+)\.base_layer\.out_proj\.(?P<factor>lora_[AB]\b.*)$")
_OWN = {"in_proj_weight": "weight", "in_proj_bias": "bias"}


@dataclass(frozen=True)
class Attention:
    """A base and its adapters, with the projections of torch's attention as modules.

    Attributes:
        inputs: modules that stand for `in_proj_weight`, by their names in the adapters.
        outputs: modules whose update counts twice.
    """

    base: Checkpoint
    adapters: tuple[Checkpoint, ...]
    inputs: frozenset[str] = frozenset()
    outputs: frozenset[str] = frozenset()
    back: Mapping[str, str] | None = None

    def restored(self, merged: Checkpoint) -> Checkpoint:
        """The result under the base's own names."""
        return merged if self.back is None else merged.rename(self.back)


def as_modules(base: Checkpoint, adapters: Sequence[Checkpoint], numerics: str) -> Attention:
    """The projections as modules, where an adapter has factors of some.

    Raises:
        Refused: PEFT's roundings over 16 bits are asked for, which it does in two ways one after the other
            (`numerics-attention`).
    """
    matches = [(n, m) for a in adapters for n in a.tensors if (m := _INNER.match(n))]
    if not matches:
        return Attention(base, tuple(adapters))
    names = {_bare(m["module"]) for _, m in matches}
    renamed = {n: f"{n.rpartition('.')[0]}.{_OWN[n.rpartition('.')[2]]}" for n in base.tensors if _is_own(n)}
    if numerics == "peft" and any(base.tensors[n].info.dtype not in (DType.F32, DType.F64) for n in renamed):
        what = "PEFT rounds the two updates of an attention's out_proj in two ways, which is not repeated to the bit"
        raise Refused("numerics-attention", what, where=show(base.origin.asked), next="--numerics best")
    return Attention(
        base.rename(renamed),
        tuple(a.rename({n: _outer(n) for n in a.tensors}) for a in adapters),
        frozenset(names),
        frozenset(f"{n}.out_proj" for n in names),
        {new: old for old, new in renamed.items()},
    )


def _is_own(name: str) -> bool:
    return name.rpartition(".")[2] in _OWN


def _outer(key: str) -> str:
    match = _INNER.match(key)
    return key if match is None else f"{match['module']}.out_proj.{match['factor']}"


def _bare(module: str) -> str:
    return module.removeprefix("base_model.model.")
