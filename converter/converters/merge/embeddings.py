"""Embeddings and their kin in a merged checkpoint: ties that come apart, vocabularies that grew, backbone prefixes."""

from __future__ import annotations

from collections.abc import Sequence

from converter.core.checkpoint import Checkpoint
from converter.core.context import Context
from converter.errors import Refused
from converter.families.ties import untied
from converter.families.words import INPUT_MODULES, OUTPUT_MODULES
from converter.text import fold, show


def with_prefix(checkpoint: Checkpoint, prefix: str, backbone: set[str]) -> Checkpoint:
    """Backbone tensors of a base stored without its prefix, under their full names: what loads beside a head."""
    return checkpoint.rename({n: prefix + n for n in checkpoint.tensors if n in backbone and not n.startswith(prefix)})


def untie(checkpoint: Checkpoint, names: Sequence[str], context: Context) -> Checkpoint:
    """Both sides of a tie written as two tensors, and the config told so."""
    ties = tuple(group for group in checkpoint.ties if not set(group) & set(names))
    context.note("info", "untied", f"untied: the adapter changes {fold(names)} and not what it is tied to")
    return checkpoint.replace(config=untied(checkpoint.config), ties=ties)


def with_vocabulary(checkpoint: Checkpoint, base: Checkpoint) -> Checkpoint:
    """`vocab_size` as many rows as the embeddings have, where an adapter brought resized ones.

    Raises:
        Refused: only one of an untied pair was resized (`vocab-mismatch`).
    """
    rows = {
        name: (base.tensors[name].info.shape[0], tensor.info.shape[0])
        for name, tensor in checkpoint.tensors.items()
        if name in base.tensors and tensor.info.shape != base.tensors[name].info.shape
    }
    if not rows:
        return checkpoint
    befores, afters = {b for b, _ in rows.values()}, {a for _, a in rows.values()}
    stale = [
        name
        for name, tensor in checkpoint.tensors.items()
        if name not in rows and name.endswith(".weight") and len(tensor.info.shape) == 2 and is_vocabulary(name)
        and tensor.info.shape[0] in befores
    ]  # fmt: skip
    if len(befores) != 1 or len(afters) != 1 or stale:
        raise Refused(
            "vocab-mismatch",
            f"the adapter resizes {fold(rows)} and not {fold(stale) or 'the rest'}",
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
    """True for an input or output embedding, by the name of its module."""
    module = name.split(".")[-2]
    return module in (*INPUT_MODULES, *OUTPUT_MODULES, "output")
