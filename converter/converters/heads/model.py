"""The head in the middle: what every dialect is read into and written from.

A score is `(head(hidden) - mean) / std`. The head is linear, `[n, h]` with a bias or without, or an MLP of one hidden
layer with ReLU. The backbone has transformers' own names: `{P}` and those of `AutoModel`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from converter.core.checkpoint import Checkpoint
from converter.core.tensors.dtypes import DType
from converter.core.tensors.nodes import LazyTensor
from converter.dialects.spec import Dialect
from converter.errors import Refused
from converter.families import memory_names
from converter.families.family import Family


@dataclass(frozen=True)
class Linear:
    """`weight` `[n, h]`, `bias` `[n]` or None."""

    weight: LazyTensor
    bias: LazyTensor | None = None

    @property
    def rows(self) -> int:
        """Values that the head gives for each token."""
        return self.weight.info.shape[0]


@dataclass(frozen=True)
class Mlp:
    """`second(relu(first(x)))`: `[units, h]` and `[n, units]`, each with its bias."""

    first: Linear
    second: Linear

    @property
    def rows(self) -> int:
        """Values that the head gives for each token."""
        return self.second.rows


Head = Linear | Mlp


@dataclass(frozen=True)
class Normaliser:
    """What is taken off a score and what it is divided by, one value for each row of the head."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    keys: str


@dataclass(frozen=True)
class Reading:
    """A source, read: the backbone with canonical names, and the head apart from it.

    Attributes:
        checkpoint: backbone and output embedding; no head, nothing beside.
        head: None for a model without one.
        normaliser: None where the score is the head's output.
        shard: the file that held the head.
        position: tensors of the backbone that stand before the head.
        stored: the head's tensors as the accounts name them: by name, or by file and name.
    """

    dialect: Dialect
    family: Family
    checkpoint: Checkpoint
    head: Head | None
    normaliser: Normaliser | None = None
    shard: str | None = None
    position: int | None = None
    stored: Mapping[str, LazyTensor] = field(default_factory=dict)


def resolve(template: str, found: Family, config: Mapping[str, Any]) -> str:
    """A name of a dialect for one family.

    Raises:
        Refused: transformers has no such class for it (`no-class`), or its prefix is unknown (`family-unknown`).
    """
    if "{tokcls}" in template:
        if found.tokcls_stem is None:
            raise no_class(found, "ForTokenClassification")
        return template.replace("{tokcls}", found.tokcls_stem)
    if "{value_head_prefix}" in template:
        prefix = config.get("value_head_prefix")
        return template.replace("{value_head_prefix}", prefix if isinstance(prefix, str) and prefix else "score")
    if "{P}" in template:
        if found.prefix is None:
            raise Refused(
                "family-unknown", f"{found.words()} is not a model type of transformers {memory_names.version()}"
            )
        return template.replace("{P}", found.prefix)
    return template


def no_class(found: Family, suffix: str) -> Refused:
    """The refusal where transformers lacks a class: the trainer would begin with a random head, and say nothing."""
    others = [n for n, has in (("trl, vllm", found.seqcls), ("openrlhf, skyrl, deepspeed-chat", found.causal)) if has]
    return Refused(
        "no-class",
        f"transformers has no {suffix} for {found.words()}: the trainer would go on with a random head, silently",
        expected=f"--to {', '.join(others)}" if others else None,
    )


def main_dtype(checkpoint: Checkpoint) -> DType:
    """The dtype that most bytes of floating point have."""
    sizes: dict[DType, int] = {}
    for tensor in checkpoint.tensors.values():
        if tensor.info.dtype.is_float:
            sizes[tensor.info.dtype] = sizes.get(tensor.info.dtype, 0) + tensor.info.nbytes
    return max(sizes, key=lambda d: sizes[d], default=DType.F32)
