"""Trainable tokens: rows of embeddings that take the base's place.

Source: https://github.com/huggingface/peft/blob/v0.21.2/src/peft/tuners/trainable_tokens/layer.py
"""

from __future__ import annotations

from converter.converters.merge.methods import fields
from converter.converters.merge.methods.method import Method, Site, Update


def update(site: Site) -> tuple[Update, ...]:
    """None: rows are taken in with all that an adapter holds whole."""
    return ()


METHOD = Method(
    title="trainable tokens",
    peft_type="TRAINABLE_TOKENS",
    factors=(),
    fields={**fields.of_training(), "token_indices": fields.tokens()},
    update=update,
    is_linear=False,
)
