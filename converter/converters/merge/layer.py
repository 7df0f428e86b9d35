"""One layer's merge: which kernel, in which orientation, at which scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from converter.converters.merge.adapter_config import AdapterConfig
from converter.converters.merge.adapter_keys import Module
from converter.core.tensors import kernel_specs
from converter.core.tensors import nodes as tensors
from converter.core.tensors.dtypes import DType, TensorInfo
from converter.core.tensors.nodes import LazyTensor
from converter.diagnostic import Again, Steps
from converter.errors import Refused
from converter.text import show

CONV1D_MODEL_TYPES = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "clvp_decoder"})
CONV1D_MODULES = frozenset({"c_attn", "q_attn", "c_proj", "c_fc"})
"""Families and modules that are transformers' Conv1D, stored `[in, out]`; everything else of these families is Linear.

Source: https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/pytorch_utils.py and its importers.
"""

MERGEABLE = frozenset({DType.F16, DType.BF16, DType.F32, DType.F64})


@dataclass(frozen=True)
class Update:
    """What one adapter adds to one weight. `kind` is `linear`, `conv1d` (stored `[in, out]`), `embedding` or `conv`."""

    kind: str
    a: LazyTensor
    b: LazyTensor
    magnitude: LazyTensor | None
    scale: float
    weight: float
    init: str
    rank: int


@dataclass(frozen=True)
class Layer:
    """An adapter's module on its way to the base tensor `target`; `where` is the adapter, for messages."""

    module: Module
    target: str
    config: AdapterConfig
    weight: float
    where: str

    def update(self, base: TensorInfo, model_config: Mapping[str, Any]) -> Update:
        """The update, its shapes checked against the base weight's.

        Raises:
            Refused: a factor is missing or has no meaning (`adapter-incomplete`), a shape does not fit
                (`adapter-shape`), the rank is not the config's (`adapter-rank`), the base isn't floating point
                (`base-quantised`).
        """
        parts = dict(self.module.factors)
        parts.pop("lora_B.bias", None)
        embedding = "lora_embedding_A" in parts or "lora_embedding_B" in parts
        names = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
        a, b = (self._take(parts, n) for n in names)
        magnitude = parts.pop("lora_magnitude_vector", None)
        if parts:
            raise self._incomplete(f"{show(next(iter(parts)))} has no place in a LoRA layer")
        if (magnitude is not None) != self.config.use_dora:
            has = "has" if magnitude is not None else "lacks"
            says = "true" if self.config.use_dora else "false"
            raise self._incomplete(f"the layer {has} a DoRA magnitude, and use_dora is {says}")
        if base.dtype not in MERGEABLE:
            raise Refused("base-quantised", f"{show(self.target)} is {base.dtype.value}", where=self.where)
        self._expect_rank(a.info.shape)
        kind = self._kind(a.info.shape, b.info.shape, base.shape, embedding, model_config)
        self._expect_magnitude(magnitude, kind, base.shape)
        if magnitude is not None and self.weight != 1:
            raise Refused("weights", "a DoRA update is not linear, so it can't be weighted", where=self.where)
        init = self.config.init if kind in ("linear", "conv1d") else "plain"
        scale = self.config.scale_of(self.module.name)
        return Update(kind, a, b, magnitude, scale, self.weight, init, a.info.shape[0])

    def _take(self, parts: dict[str, LazyTensor], name: str) -> LazyTensor:
        if name not in parts:
            raise self._incomplete(f"{name} is missing")
        return parts.pop(name)

    def _incomplete(self, what: str) -> Refused:
        return Refused("adapter-incomplete", f"{show(self.module.name)}: {what}", where=self.where)

    def _expect_rank(self, shape: tuple[int, ...]) -> None:
        expected = self.config.rank_of(self.module.name)
        got = shape[0] if shape else 0
        if got != expected:
            raise Refused(
                "adapter-rank",
                f"the rank of {show(self.module.name)} is not the one in adapter_config.json",
                where=self.where,
                expected=f"r = {expected}",
                got=f"r = {got} in the tensor",
            )

    def _kind(
        self,
        a: tuple[int, ...],
        b: tuple[int, ...],
        base: tuple[int, ...],
        embedding: bool,
        model_config: Mapping[str, Any],
    ) -> str:
        rank = a[0]
        if len(a) >= 2 and len(b) >= 2 and b[1] == rank:
            if len(base) > 2:
                ones = (1,) * (len(base) - 2)
                if not embedding and len(base) <= 5 and a[1:] == base[1:] and b == (base[0], rank, *ones):
                    return "conv"
                if not embedding and len(a) == len(base) and b[0] == base[0] and a[1] != base[1]:
                    raise Refused("adapter-shape", f"{show(self.target)} is a grouped convolution", where=self.where)
            elif len(a) == len(b) == 2:
                across, along = (b[0], a[1]) == base, (a[1], b[0]) == base
                if embedding and along:
                    return "embedding"
                if not embedding and (across or along):
                    return self._orientation(across, along, model_config)
        raise Refused(
            "adapter-shape",
            f"the factors of {show(self.module.name)} do not fit the base weight",
            where=self.where,
            expected=f"factors of a weight {list(base)}",
            got=f"A {list(a)}, B {list(b)}",
            next=Steps("name the base that the adapter was trained on: ", Again(("--base", "DIR"))),
        )

    def _orientation(self, across: bool, along: bool, model_config: Mapping[str, Any]) -> str:
        """`[out, in]` or `[in, out]`: by shape, and for square weights by the family."""
        if across and along:
            return "conv1d" if is_conv1d(self.target, model_config) else "linear"
        return "linear" if across else "conv1d"

    def _expect_magnitude(self, magnitude: LazyTensor | None, kind: str, base: tuple[int, ...]) -> None:
        if magnitude is None:
            return
        outputs = base[1] if kind in ("conv1d", "embedding") else base[0]
        if magnitude.info.numel != outputs:
            raise self._incomplete(f"the magnitude has {magnitude.info.numel} elements, not {outputs}")


def is_conv1d(name: str, config: Mapping[str, Any]) -> bool:
    """True for a tensor of a Conv1D: by its module's name, and by the family of the model or of the part it is in."""
    inner = {f"{key}.": part for key, part in config.items() if isinstance(part, Mapping)}
    own = [part for key, part in inner.items() if name.startswith(key)]
    family = any(str(part.get("model_type")) in CONV1D_MODEL_TYPES for part in own or [config, *inner.values()])
    return family and not CONV1D_MODULES.isdisjoint(name.split(".")[-2:-1])


def merged_weight(base: LazyTensor, updates: Sequence[Update], numerics: str) -> LazyTensor:
    """The base weight with all updates, rounded to its own dtype."""
    kinds = {u.kind for u in updates}
    if len(kinds) != 1:
        raise Refused("adapters-conflict", "adapters treat one layer as different kinds")
    (kind,) = kinds
    transposed = kind in ("conv1d", "embedding")
    weight = base
    first = updates[0]
    if first.init in ("pissa", "olora"):
        residual: dict[str, kernel_specs.Param] = {
            "init": first.init,
            "rank": first.rank,
            "scale": first.scale,
            "transposed": transposed,
        }
        weight = tensors.apply(kernel_specs.RESIDUAL_BASE, [base], residual)
    inputs: list[LazyTensor] = [weight]
    for update in updates:
        inputs += [update.a, update.b]
        if update.magnitude is not None:
            inputs.append(_flat(update.magnitude))
    params: dict[str, kernel_specs.Param] = {
        "scales": tuple(u.scale * u.weight for u in updates),
        "dora": tuple(u.magnitude is not None for u in updates),
        "numerics": numerics,
        "out": base.info.dtype.value,
    }
    if kind == "conv":
        return tensors.apply(kernel_specs.LORA_CONV_MERGE, inputs, params)
    rounded = kind == "embedding" or first.init == "mica"
    params |= {"transposed": transposed, "delta_rounded": rounded and numerics == "peft"}
    return tensors.apply(kernel_specs.LORA_MERGE, inputs, params)


def _flat(magnitude: LazyTensor) -> LazyTensor:
    return tensors.reshape(magnitude, (magnitude.info.numel,))


def merged_bias(base: LazyTensor, added: Sequence[tuple[LazyTensor, float]], numerics: str) -> LazyTensor:
    """A bias with every `lora_B.bias` at its scale."""
    params: dict[str, kernel_specs.Param] = {
        "scales": tuple(scale for _, scale in added),
        "numerics": numerics,
        "out": base.info.dtype.value,
    }
    return tensors.apply(kernel_specs.BIAS_MERGE, [base, *(tensor for tensor, _ in added)], params)


def with_token_rows(weight: LazyTensor, rows: LazyTensor, indices: tuple[int, ...]) -> LazyTensor:
    """An embedding with some rows replaced by trained ones.

    Raises:
        Refused: an index past the vocabulary, or rows of another width (`adapter-tokens`).
    """
    vocabulary, width = weight.info.shape
    if max(indices, default=0) >= vocabulary or rows.info.shape != (len(indices), width):
        raise Refused(
            "adapter-tokens", f"token rows {list(rows.info.shape)} do not fit an embedding {list(weight.info.shape)}"
        )
    parts: list[LazyTensor] = []
    position = 0
    trained = tensors.cast(rows, weight.info.dtype)
    for token, row in sorted(zip(indices, range(len(indices)), strict=True)):
        parts.append(tensors.narrow(weight, 0, position, token - position))
        parts.append(tensors.narrow(trained, 0, row, 1))
        position = token + 1
    parts.append(tensors.narrow(weight, 0, position, vocabulary - position))
    return tensors.concat([p for p in parts if p.info.shape[0]], 0)
