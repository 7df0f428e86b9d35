"""Embeddings and their kin in a merged checkpoint: ties that come apart, vocabularies that grew, backbone prefixes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from converter.core.checkpoint import Checkpoint
from converter.core.context import Context
from converter.core.tensors import nodes as tensors
from converter.core.tensors.kernel_specs import WEIGHTED_SUM
from converter.core.tensors.nodes import LazyTensor
from converter.errors import Refused
from converter.families.ties import find_ties, is_output, untied
from converter.families.words import INPUT_MODULES, OUTPUT_MODULES
from converter.text import fold, show


def with_prefix(checkpoint: Checkpoint, prefix: str, backbone: set[str]) -> Checkpoint:
    """Backbone tensors of a base stored without its prefix, under their full names: what loads beside a head."""
    return checkpoint.rename({n: prefix + n for n in checkpoint.tensors if n in backbone and not n.startswith(prefix)})


def untie(checkpoint: Checkpoint, names: Sequence[str], context: Context) -> Checkpoint:
    """Both sides of a tie written as two tensors, and the config told so.

    Other ties that go by the same word of the config come apart with it, such as the two biases of BERT's output
    embedding: what was stored once is then stored under each name.
    """
    config, stored, shards = untied(checkpoint.config), dict(checkpoint.tensors), dict(checkpoint.shards)
    still = {name for group in find_ties(stored, config) for name in group}
    others = [group for group in checkpoint.ties if not set(group) & set(names)]
    for group in others:
        held = next(n for n in group if n in stored)
        for name in (n for n in group if n not in stored and n not in still):
            stored[name] = stored[held]
            shards |= {name: shards[held]} if held in shards else {}
    ties = tuple(group for group in others if still.issuperset(group))
    context.note("info", "untied", f"untied: the adapter changes {fold(names)} and not what it is tied to")
    config |= {_SCALE: False} if _SCALE in config else {}
    stored |= _scaled_heads({n: stored[n] for n in names if n in stored and is_output(n)}, checkpoint)
    return checkpoint.replace(tensors=stored, shards=shards, config=config, ties=ties)


def _scaled_heads(heads: Mapping[str, LazyTensor], before: Checkpoint) -> dict[str, LazyTensor]:
    """Output embeddings as a class needs them that scales its decoder's outputs where the two are tied, and only there.

    Raises:
        Refused: its releases of transformers disagree on the scale of two that are not tied (`tied-scale`).
    """
    kind = before.config.get("model_type")
    if not heads or not (kind in SCALED_ANYHOW or _is_scaled(before.config)):
        return dict(heads)
    width = before.config.get("d_model", 512)
    if kind in SCALED_ANYHOW or not isinstance(width, int) or width < 1:
        raise Refused(
            "tied-scale",
            f"the adapter changes one of two tied embeddings of {show(str(kind))}, and releases of transformers "
            "disagree on how its decoder's outputs are scaled where they are not tied: no file says the same in all",
            where=show(before.origin.asked),
            got=fold(heads),
            next="keep the adapter beside its base, and load both with PEFT and the transformers of the training",
        )
    scale = width**-0.5
    return {
        name: tensors.apply(WEIGHTED_SUM, [head], {"shares": (scale,), "out": head.info.dtype.value})
        for name, head in heads.items()
    }


def expect_no_scale(base: Checkpoint, stored: Sequence[str]) -> None:
    """Go on where a tie of two tensors that differ in the files says nothing of how outputs are scaled.

    Raises:
        Refused: it does (`tied-copies-differ`).
    """
    if _is_scaled(base.config):
        what = f"{fold(stored)} are tied in config.json, which scales the decoder's outputs, and differ in the files"
        raise Refused("tied-copies-differ", what, where=show(base.origin.asked))


def _is_scaled(config: Mapping[str, Any]) -> bool:
    """True where outputs are scaled: what transformers 5 writes of it counts, else the word on ties."""
    said = config.get(_SCALE, config.get("tie_word_embeddings") is not False)
    return config.get("model_type") in SCALED_IF_TIED and said is not False


_SCALE = "scale_decoder_outputs"

SCALED_IF_TIED = ("t5", "longt5", "pop2piano")
"""Types whose decoder's outputs are multiplied by `d_model ** -0.5` where config.json ties embeddings, or is silent.

Source: `scale_decoder_outputs`, https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/models/t5/configuration_t5.py
"""

SCALED_ANYHOW = ("mt5", "umt5", "switch_transformers", "udop")
"""Types of which transformers 4 asks the config whether to scale, and transformers 5 does or does not in any case."""


def with_vocabulary(checkpoint: Checkpoint, base: Checkpoint, prefix: str = "") -> Checkpoint:
    """`vocab_size` as many rows as the embeddings have, where an adapter brought resized ones.

    Args:
        prefix: what names of the checkpoint have before those of the base.

    Raises:
        Refused: only one of an untied pair was resized (`vocab-mismatch`).
    """
    before_of = {
        name: base.tensors.get(name) or base.tensors.get(name.removeprefix(prefix)) for name in checkpoint.tensors
    }
    rows = {
        name: (old.info.shape[0], checkpoint.tensors[name].info.shape[0])
        for name, old in before_of.items()
        if old is not None and old.info.shape != checkpoint.tensors[name].info.shape
    }
    if not rows:
        return checkpoint
    befores, afters = {b for b, _ in rows.values()}, {a for _, a in rows.values()}
    stale = [
        name
        for name, old in before_of.items()
        if old is not None and name not in rows and is_vocabulary(name) and befores & {*old.info.shape[:1]}
    ]
    if len(befores) != 1 or len(afters) != 1 or stale:
        raise Refused(
            "vocab-mismatch",
            f"the adapter was trained with {fold(map(str, sorted(afters)))} tokens and brings {fold(rows)} for them; "
            + (f"the new rows of {fold(stale)} were never saved" if stale else "they do not agree"),
            where=show(base.origin.asked),
            expected=f"{sorted(afters)} rows in input and output embeddings",
            got=f"{sorted(befores)} rows in the base",
            next="train or save both sides: modules_to_save=['embed_tokens', 'lm_head']",
        )
    (before,), (after,) = befores, afters
    config = dict(checkpoint.config)
    for key, value in checkpoint.config.items():
        if key == "vocab_size" and value == before:
            config[key] = after
        elif isinstance(value, dict) and value.get("vocab_size") == before:
            config[key] = value | {"vocab_size": after}
    return checkpoint.replace(config=config)


def is_vocabulary(name: str) -> bool:
    """True for an input or output embedding, or a bias of the latter, by the name of its module."""
    pieces = name.split(".")
    return len(pieces) > 1 and pieces[-2] in (*INPUT_MODULES, *OUTPUT_MODULES, "output")


def has_vocabulary_rows(name: str, tensor: LazyTensor, base: Checkpoint) -> bool:
    """True for a tensor with a row for each token: by its name, or as many rows as a `vocab_size` of the config."""
    parts = (base.config, *(v for v in base.config.values() if isinstance(v, Mapping)))
    rows = tensor.info.shape[0] if tensor.info.shape else 0
    return is_vocabulary(name) or rows in [part.get("vocab_size") for part in parts]
