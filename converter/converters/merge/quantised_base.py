"""A merge over a quantised base: what it does not touch stays as it lies; what it touches has to be whole first."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from converter.converters.merge.quantised.dequantise import DEQUANTISED
from converter.converters.merge.quantised.full_precision import full_precision_of, is_quantised_name
from converter.converters.merge.quantised.requantise import requantised
from converter.converters.merge.quantised.whole import expect_parts, found_in, whole
from converter.core.checkpoint import Checkpoint
from converter.core.context import Context
from converter.diagnostic import Again, Command, Steps
from converter.errors import Refused
from converter.families.quantised.reading import Quantised
from converter.text import fold, show

_OVER_OTHER_NAMES = frozenset({"adapter-unmatched", "adapter-shape", "base-quantised", "adapter-fused"})
"""What a merge says of a weight whose parts it does not know."""


def over_quantised(
    base: Checkpoint,
    adapters: Sequence[Checkpoint],
    context: Context,
    merge: Callable[[Checkpoint], Checkpoint],
    *,
    back: bool = False,
) -> Checkpoint:
    """Merge into a base of which some weights may be quantised.

    Args:
        back: adapted weights that are quantised are written back in their own format.

    Raises:
        Refused: an adapted weight is quantised (`base-quantised`), or a quantised weight lacks a part
            (`quantised-incomplete`).
    """
    found = found_in(base)
    if not found.method:
        _say_of_training(base, adapters, context)
        return merge(base)
    expect_parts(found, show(base.origin.asked))
    if not found.weights and not found.unsupported and found.method != "bitsandbytes":
        what = f"config.json says that the base is quantised ({found.title}), and no weight is"
        doctor = Command("doctor", (base.origin.asked,))
        raise Refused("base-quantised", what, where=show(base.origin.asked), next=doctor)
    try:
        held = None if found.unsupported else whole(base, found, context)
    except Refused as error:
        if error.code != "quantised-unsupported":
            raise
        found = Quantised(found.method, unsupported=error.what)
        held = None
    if held is None:
        return _as_it_is(base, found, adapters, merge)
    result = merge(held.after)
    touched = held.changed(result)
    if touched and back:
        return requantised(held, result, touched, context)
    if touched:
        what = (
            f"{len(touched)} adapted weights are quantised ({found.words} in all): {fold(touched)}; a merge needs "
            "them whole"
        )
        raise Refused("base-quantised", what, where=show(base.origin.asked), next=_next(base, found, adapters))
    _say_kept(found.words or found.title, context)
    return held.as_it_lay(result)


def _as_it_is(
    base: Checkpoint, found: Quantised, adapters: Sequence[Checkpoint], merge: Callable[[Checkpoint], Checkpoint]
) -> Checkpoint:
    """Merge into weights that are whole, of a base whose others are not read."""
    try:
        return merge(base)
    except Refused as error:
        if error.code not in _OVER_OTHER_NAMES:
            raise
        what = f"adapted weights of the base are quantised, and can't be made whole: {found.unsupported}"
        next_steps = _next(base, found, adapters)
        raise Refused("base-quantised", what, where=show(base.origin.asked), next=next_steps) from error


def _next(base: Checkpoint, found: Quantised, adapters: Sequence[Checkpoint]) -> Steps:
    """The full-precision base, where one is known, and `--dequantize`, where the format is read."""
    recorded = adapters[0].config.get("base_model_name_or_path")
    asked = adapters[0].origin.asked
    name = full_precision_of(base, recorded)
    merge = Command("merge-lora", (asked, "OUT"))
    into_whole = Again(("--base", name), otherwise=merge.with_options("--base", name)) if name else None
    here = ("--base", base.origin.asked, "--dequantize")
    made_whole = Again(here[2:], otherwise=merge.with_options(*here)) if not found.unsupported else None
    if made_whole is None and into_whole is None:
        return Steps("name the full-precision base that this one was made from: ", Again(("--base", "DIR")))
    if made_whole is None:
        return Steps("merge into the full-precision base: ", into_whole)
    first = Steps("make the base whole, which is what the adapter was trained over: ", made_whole)
    return Steps(first, "; or merge into the full-precision base: ", into_whole) if into_whole else first


def _say_kept(words: str, context: Context) -> None:
    text = f"weights of the base that the adapter does not touch stay quantised, as they lie: {words}"
    context.note("info", "quantised-kept", text)


def _say_of_training(base: Checkpoint, adapters: Sequence[Checkpoint], context: Context) -> None:
    """Which of two bases an adapter was trained over, where it shows: the quantised one, or one in 16 bits."""
    made = next((n for n in context.notes if n.code == DEQUANTISED), None)
    recorded = [n for a in adapters if isinstance(n := a.config.get("base_model_name_or_path"), str)]
    if made is not None:
        of_run = all(a.origin.path == base.origin.path for a in adapters)
        whole_ones = [n for n in recorded if not is_quantised_name(n) and _last(n) != _last(base.origin.path)]
        text = "merged onto the dequantised weights: an adapter that was trained over this base was trained over these"
        if whole_ones and not of_run:
            text = (
                f"merged onto the dequantised weights; the adapter records {show(whole_ones[0])} as its base: nearer "
                "to its training are that model's own weights, unless it was loaded quantised"
            )
        context.note("info", "trained-over", text)
    elif quantised := next((n for n in recorded if is_quantised_name(n)), None):
        text = (
            f"the adapter was trained over {show(quantised)}, which is quantised; this base is not: nearer to its "
            "training is that base with --dequantize"
        )
        context.note("info", "trained-over", text)


def _last(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2].lower()
