"""The head in the middle: what every dialect is read into and written from.

A score is `(head(hidden) - mean) / std`. The head is linear, `[n, h]` with a bias or without, or an MLP of one hidden
layer with ReLU. The backbone has transformers' own names: `{P}` and those of `AutoModel`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from converter.core.checkpoint import Checkpoint
from converter.core.tensors.dtypes import DType
from converter.core.tensors.nodes import LazyTensor
from converter.dialects.spec import Dialect
from converter.errors import Refused
from converter.families import memory_names
from converter.text import show

# Model types that only a dialect has, and what they are to transformers.
_MODEL_TYPES = {"gpt_neox_reward_model": "gpt_neox"}
_SUFFIXES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")

# Decoders whose output embedding is tied where config.json is silent.
# Source: the config classes of transformers 5.23, built without arguments.
_TIED = """
    bloom cohere cohere2 ctrl falcon gemma gemma2 gemma3 gemma3_text gpt2 gpt_bigcode gpt_neo mpt opt smollm3
    starcoder2 xglm
"""
_TIED_BY_DEFAULT = frozenset(_TIED.split())


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
class Family:
    """What transformers has for a model type.

    Attributes:
        prefix: `{P}`, or None where the type is unknown.
        causal, seqcls, tokcls: names of its classes, or None.
        head_names: tensors of the head of `seqcls` and of `tokcls`.
        hidden: the hidden size, where the config says it.
        tied: the output embedding is the input's.
    """

    kind: str
    prefix: str | None
    causal: str | None
    seqcls: str | None
    tokcls: str | None
    head_names: Mapping[str, tuple[str, ...]]
    hidden: int | None
    tied: bool

    @property
    def tokcls_stem(self) -> str | None:
        """`score` or `classifier`; None where there is no such class, or its head is not one linear layer."""
        names = self.head_names.get("tokcls", ())
        stem = names[0].removesuffix(".weight") if names else ""
        return stem if stem and set(names) <= {f"{stem}.weight", f"{stem}.bias"} else None

    @property
    def is_encoder(self) -> bool:
        """True where the sequence classification class pools by more than one linear layer on one token."""
        names = self.head_names.get("seqcls", ())
        return bool(names) and names != ("score.weight",)

    def words(self) -> str:
        """The model type, for messages."""
        return show(self.kind or "an unknown model type")


def family(config: Mapping[str, Any]) -> Family:
    """What is known of a config's model type."""
    kind = model_type(config)
    named = {task: _auto(task, kind) for task in ("CAUSAL_LM", "SEQ_CLS", "TOKEN_CLS", "base")}
    heads = {}
    for word, task in (("seqcls", "SEQ_CLS"), ("tokcls", "TOKEN_CLS")):
        found = memory_names.classifier({**config, "model_type": kind}, {"task_type": task})
        heads[word] = () if found is None else found.own
    return Family(
        kind,
        _prefix(kind, config),
        named["CAUSAL_LM"] or _conditional(config),
        named["SEQ_CLS"],
        named["TOKEN_CLS"],
        heads,
        hidden_size(config),
        is_tied(config),
    )


def model_type(config: Mapping[str, Any]) -> str:
    """`model_type`, as transformers calls it."""
    kind = config.get("model_type")
    kind = kind if isinstance(kind, str) else ""
    return _MODEL_TYPES.get(kind, kind)


@functools.cache
def _auto(task: str, kind: str) -> str | None:
    return memory_names.auto_class(task, kind)


def _conditional(config: Mapping[str, Any]) -> str | None:
    """A class with an output embedding that the config itself names, where no auto class does."""
    names = config.get("architectures")
    first = names[0] if isinstance(names, list) and names else None
    return first if isinstance(first, str) and first.endswith(_SUFFIXES) else None


def _prefix(kind: str, config: Mapping[str, Any]) -> str | None:
    for task in ("CAUSAL_LM", "SEQ_CLS", "TOKEN_CLS"):
        found = memory_names.architecture(_auto(task, kind), config)
        if found is not None and found.prefix:
            return f"{found.prefix}."
    return None


def hidden_size(config: Mapping[str, Any]) -> int | None:
    """Width of the last hidden states: OPT's `word_embed_proj_dim` where it has one, else the hidden size."""
    text = config.get("text_config")
    for each in (config, text if isinstance(text, Mapping) else {}):
        for key in ("word_embed_proj_dim", "hidden_size", "n_embd", "d_model"):
            value = each.get(key)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
    return None


def is_tied(config: Mapping[str, Any]) -> bool:
    """True where the output embedding is the input's, by the config or by the default of its type."""
    text = config.get("text_config")
    for each in (config, text if isinstance(text, Mapping) else {}):
        if isinstance(each.get("tie_word_embeddings"), bool):
            return bool(each["tie_word_embeddings"])
    return model_type(config) in _TIED_BY_DEFAULT


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
                "family-unknown", f"{found.words()} is no model type of transformers {memory_names.version()}"
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
