"""Embeddings and their kin in a merged checkpoint: ties that come apart, vocabularies that grew, backbone prefixes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from converter.core.checkpoint import Checkpoint
from converter.core.context import Context
from converter.core.tensors.nodes import LazyTensor
from converter.errors import Refused
from converter.families.ties import find_ties, untied
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
    config, tensors, shards = untied(checkpoint.config), dict(checkpoint.tensors), dict(checkpoint.shards)
    still = {name for group in find_ties(tensors, config) for name in group}
    others = [group for group in checkpoint.ties if not set(group) & set(names)]
    for group in others:
        held = next(n for n in group if n in tensors)
        for name in (n for n in group if n not in tensors and n not in still):
            tensors[name] = tensors[held]
            shards |= {name: shards[held]} if held in shards else {}
    ties = tuple(group for group in others if still.issuperset(group))
    context.note("info", "untied", f"untied: the adapter changes {fold(names)} and not what it is tied to")
    return checkpoint.replace(tensors=tensors, shards=shards, config=config, ties=ties)


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
