"""Whether a folder or a file is a copy of the same checkpoint: equal where both are whole, and not the base."""

from __future__ import annotations

from collections.abc import Iterable

from converter.converters.fill.evidence import same, whole_in_both
from converter.converters.fill.offers import ADAPTER, Offer, is_telling
from converter.converters.gather.adapter_config import HEADS
from converter.core.checkpoint import Checkpoint
from converter.core.context import Context


def is_proved_copy(broken: Checkpoint, offer: Offer, base: Checkpoint | None, context: Context) -> str | None:
    """None for a copy; else why it isn't one, or may not be.

    Norms that are equal prove nothing: they are equal in the base, and in every step of a bf16 run. A copy shows by an
    equal tensor that training changed: a factor, a head, or a matrix that is not the base's.
    """
    if offer.verdict == "other":
        return f"not a copy: {offer.why}"
    both = whole_in_both(broken.tensors, offer.tensors)
    if broken.origin.kind == ADAPTER:
        if any(is_telling(n, offer.tensors[n]) and not context.is_zero(offer.tensors[n]) for n in both):
            return None
    elif _has_head(both) and (base is None or not _has_head(base.tensors)):
        return None
    if base is not None:
        matrices = [n for n in both if is_telling(n, offer.tensors[n]) and n in base.tensors]
        if any(not same(context, offer.tensors[n], base.tensors[n]) for n in matrices):
            return None
    if broken.origin.kind == ADAPTER:
        return f"may be of another step: {offer.why}, and no trained one is among them"
    return (
        f"may be the base model: {offer.why}, and none of them is shown to have been trained; --base BASE may show it"
    )


def _has_head(names: Iterable[str]) -> bool:
    return any(part in HEADS for name in names for part in name.split("."))
