"""`--combine`: several LoRA adapters made into one before they are merged, as PEFT's `add_weighted_adapter` does.

`sum`, the default, needs none of it: all updates are added exactly and rounded once, whatever their methods and ranks.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from converter.converters.merge.methods.method import AdapterConfig, Update
from converter.core.checkpoint import Checkpoint
from converter.core.context import Context
from converter.core.tensors import kernel_specs
from converter.core.tensors import nodes as tensors
from converter.core.tensors.dtypes import DType, TensorInfo
from converter.core.tensors.kernel_specs import Infos, KernelSpec, Param, Params
from converter.errors import Refused, UsageError
from converter.text import show

How = Literal["sum", "cat", "linear", "svd", "ties", "magnitude_prune", "dare_linear", "dare_ties"]

_PRUNING = frozenset({"ties", "magnitude_prune", "dare_linear", "dare_ties"})
_ELEMENTWISE = _PRUNING | {"linear"}


def _info(inputs: Infos, params: Params) -> TensorInfo:
    first, second = inputs[0::2], inputs[1::2]
    if params["how"] == "cat":
        rank = sum(a.shape[0] for a in first)
    elif params["how"] == "svd":
        rank = min(int(str(params["rank"])), first[0].shape[1], second[0].shape[0])
    else:
        rank = first[0].shape[0]
    a, b = first[0].shape, second[0].shape
    shape = (rank, *a[1:]) if params["part"] == "A" else (b[0], rank, *b[2:])
    return TensorInfo(DType(params["out"]), shape)


def _workspace(inputs: Infos, params: Params) -> int:
    width = 8 if params["out"] == "F64" else 4
    factors = sum(i.numel for i in inputs)
    rows, columns = inputs[1].shape[0], inputs[0].shape[1]
    whole = (len(inputs) // 2 + 2) * rows * columns + 2 * (rows * rows + columns * columns)
    return width * (4 * factors + (whole if params["how"] == "svd" else 0))


LORA_COMBINE = KernelSpec(
    "lora-combine",
    "converter.core.compute.combining:lora_combine",
    _info,
    lambda start, stop, inputs, params: None,
    _workspace,
)
"""One factor of several adapters made into one. Inputs: for each adapter A `[r, in]` and B `[out, r]`. Params: `how`,
`part` (`A` or `B`), `weights` and `scales` (one for each adapter), `density`, `seed`, `majority`, `rank`, `out`."""


@dataclass(frozen=True)
class Combination:
    """How several adapters become one.

    Attributes:
        how: `sum` adds their updates; the others are PEFT's.
        density: the share of elements that is kept, where some are dropped.
        rank: of what `svd` gives; 0: the largest of the adapters.
        seed: of what `dare_*` draws; each tensor has a seed of its own, made of this one and of its name.
        majority: how `ties` finds the sign of an element: of the sum, or of most adapters.
    """

    how: How = "sum"
    density: float | None = None
    rank: int = 0
    seed: int = 0
    majority: Literal["total", "frequency"] = "total"

    def expect_sound(self) -> None:
        """Refuse what does not go together.

        Raises:
            UsageError: a density is missing, has no use, or is none (`usage`).
        """
        needs = self.how in _PRUNING
        if needs and (self.density is None or not 0 < self.density <= 1):
            raise UsageError("usage", f"--combine {self.how} needs --density, above 0 and at most 1")
        if not needs and self.density is not None:
            raise UsageError("usage", f"--combine {self.how} drops no elements, so --density has no use")
        if self.rank < 0 or (self.rank and self.how != "svd"):
            raise UsageError("usage", "--svd-rank is a number above 0 for --combine svd")

    def over(self, configs: Sequence[AdapterConfig], wheres: Sequence[str]) -> Combination:
        """The same over certain adapters, with the rank that PEFT takes: the largest that a config names.

        Raises:
            Refused: an adapter is of another method, or has biases (`adapters-conflict`).
        """
        if self.how == "sum":
            return self
        for config, where in zip(configs, wheres, strict=True):
            method = config.method
            if method.peft_type != "LORA" or method.switch in ("use_dora", "kasa_config", "use_bdlora"):
                what = f"--combine {self.how} is of LoRA adapters, and this is {method.title}; sum takes all"
                raise Refused("adapters-conflict", what, where=where)
            if config.fields.get("use_rslora") and self.how != "cat":
                what = (
                    f"PEFT scales what --combine {self.how} makes of rank-stabilised adapters by the root of the rank"
                )
                raise Refused("adapters-conflict", what, where=where, next="merge them with --combine sum")

        ranks = [r for c in configs for r in (c.fields["r"], *c.fields["rank_pattern"].values())]
        return dataclasses.replace(self, rank=self.rank or max(ranks))

    def of(self, updates: Sequence[Update], name: str, numerics: str) -> list[Update]:
        """The updates of one tensor as one.

        Raises:
            Refused: they are not of one kind or rank, or have no such combination (`adapters-conflict`).
        """
        if self.how == "sum" or not updates:
            return list(updates)
        kernels = {u.kernel.name for u in updates}
        known = {kernel_specs.LORA_MERGE.name} | ({kernel_specs.LORA_CONV_MERGE.name} if self.how != "svd" else set())
        if len(kernels) > 1 or not kernels <= known:
            raise Refused("adapters-conflict", f"--combine {self.how} has no meaning for {show(name)}")
        ranks = {u.inputs[0].info.shape[0] for u in updates}
        if self.how in _ELEMENTWISE and len(ranks) > 1:
            what = f"--combine {self.how} adds factors element by element, and those of {show(name)} have ranks"
            raise Refused("adapters-conflict", f"{what} {sorted(ranks)}", next="use --combine sum, cat or svd")
        first = updates[0]
        if any(u.region is not None for u in updates):
            what = f"--combine {self.how} is not made for experts that are one tensor, and {show(name)} has them"
            raise Refused("adapters-conflict", what, next="merge them with --combine sum")
        # Of a `cat` PEFT keeps the factors in the base's dtype, and rounds the update before it adds it.
        is_rounded = self.how == "cat" and numerics == "peft"
        wide = numerics == "best" and first.params["out"] in ("F32", "F64")
        params: dict[str, Param] = {
            "how": self.how,
            "weights": tuple(u.weighted[0] for u in updates),
            "scales": tuple(u.weighted[1] for u in updates),
            "density": float(self.density or 1),
            "seed": zlib.crc32(f"{self.seed} {name}".encode()),
            "majority": self.majority,
            "rank": self.rank,
            "out": first.params["out"] if is_rounded else "F64" if wide else "F32",
        }
        factors = [tensor for update in updates for tensor in update.inputs]
        made = tuple(tensors.apply(LORA_COMBINE, factors, params | {"part": part}) for part in "AB")
        merge = {**first.params, "scales": (1.0,)} | ({"delta_rounded": True} if is_rounded else {})
        return [dataclasses.replace(first, inputs=made, params=merge, scale=1.0)]


def in_order(
    adapters: Sequence[Checkpoint], configs: Sequence[AdapterConfig], context: Context
) -> Sequence[Sequence[int]]:
    """Adapters that are merged together, by number: all, or one after another.

    An update that depends on the weight below it (DoRA's norm) and an adapter that records another base than the first:
    it was trained over what the ones before it made.
    """
    bases = {show(a.config.get("base_model_name_or_path")) for a in adapters}
    if len(bases) < 2 or all(c.method.is_linear for c in configs[1:]):
        return [range(len(adapters))]
    listed = ", then ".join(show(a.origin.asked) for a in adapters)
    text = f"the adapters record different bases, and not all add up: merged one into the result of another, {listed}"
    context.note("info", "adapters-in-order", text)
    return [[at] for at in range(len(adapters))]
