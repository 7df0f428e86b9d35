"""What transformers has for a model type: classes, head names, prefix, sizes, ties. Inferred from the config alone."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from converter.families import memory_names
from converter.families.ties import is_tied
from converter.families.words import CAUSAL_CLASSES
from converter.text import show

# Model types that only a dialect has, and what they are to transformers.
_MODEL_TYPES = {"gpt_neox_reward_model": "gpt_neox"}


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
    return first if isinstance(first, str) and first.endswith(CAUSAL_CLASSES) else None


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
        for key in ("word_embed_proj_dim", "hidden_size", "n_embd", "d_model", "dim", "emb_dim"):
            value = each.get(key)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
    return None


def label_count(config: Mapping[str, Any]) -> int | None:
    """Number of labels as transformers understands a config: `num_labels`, else the entries of `id2label`."""
    if isinstance(config.get("num_labels"), int):
        return int(config["num_labels"])
    named = config.get("id2label")
    return len(named) if isinstance(named, Mapping) else None
