"""Output embeddings of a gathered model that its config ties to the input's: stored once, as `save_pretrained` does."""

from __future__ import annotations

from converter.core.checkpoint import Checkpoint
from converter.core.context import Context
from converter.core.tensors.nodes import Cast, LazyTensor
from converter.families.ties import is_tied, untied
from converter.families.words import OUTPUTS, input_embedding
from converter.text import show


def without_tied_copies(found: Checkpoint, context: Context) -> Checkpoint:
    """A tied output embedding is not written twice: transformers makes it from the input's.

    Some frameworks store both and record no tie. Where they are equal, one goes; where they differ, both stay and the
    config is told that they are two.
    """
    kept = dict(found.tensors)
    config, dropped = dict(found.config), dict(found.dropped)
    if not is_tied(config):
        return found
    for head in [n for n in OUTPUTS if n in kept]:
        if any(n in kept for n in found.tied_to(head)):
            del kept[head]
            continue
        embedding = input_embedding(kept)
        if embedding is None:
            continue
        if _equal(kept[head], kept[embedding], context):
            del kept[head]
            dropped[head] = f"identical with {embedding}, to which it is tied"
            continue
        config = untied(config)
        text = f"{show(head)} and {show(embedding)} differ: both are written, and tie_word_embeddings is false"
        context.note("changes-numbers", "tied-differ", text)
    left = (*found.left, *(found.tensors[n] for n in dropped.keys() - found.dropped.keys()))
    return found.replace(tensors=kept, config=config, dropped=dropped, left=left)


def _equal(a: LazyTensor, b: LazyTensor, context: Context) -> bool:
    """Equal bit by bit; of two that are rounded alike, before rounding."""
    if isinstance(a, Cast) and isinstance(b, Cast) and a.dtype is b.dtype:
        a, b = a.source, b.source
    return a is b or context.equal(a, b)
