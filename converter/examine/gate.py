"""The gate: what is about to be written is the model that its own loader asks for, or the user has consented.

Every verb that writes passes here, before the first byte.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import TypeVar

from converter.converters.adapters.whole import expect_loadable
from converter.converters.heads.whole import MISSHAPEN, MISSING, Judgement, judge
from converter.converters.merge.adapter_itself import UNTARGETED, inconsistency, untargeted_text
from converter.converters.merge.adapter_values import expect_finite
from converter.converters.merge.asked_modules import modules_missing, modules_untargeted
from converter.converters.merge.merge_lora import MergeLora
from converter.converters.merge.quantised.dequantise import Dequantise
from converter.converters.merge.quantised.whole import expect_parts, found_in
from converter.core.checkpoint import ADAPTER, MODEL, Checkpoint
from converter.core.context import Context
from converter.core.tensors.nodes import LazyTensor
from converter.diagnostic import Command, as_argument
from converter.errors import ConvertError, Refused, UsageError
from converter.families.quantised.left import LEFT, is_left
from converter.families.words import without_wrappers
from converter.sources.opening import open_recorded_base
from converter.text import fold, show

FAMILY_UNKNOWN, CONFIG_REFUSED = "family-unknown", "config-refused"


def expect_whole(checkpoint: Checkpoint, context: Context) -> None:
    """Compare what a plan writes with what its loader asks for.

    Raises:
        Refused: tensors are missing (`tensors-missing`), of other shapes (`tensors-misshapen`) or left over
            (`tensors-unexpected`), without consent; or a quantised weight lacks a part (`quantised-incomplete`), or
            none is quantised where config.json says so (`quantisation-left`), or transformers builds no model of the
            config (`config-refused`); of an adapter, PEFT would pass over a part
            of it (see `expect_loadable`).
    """
    if checkpoint.origin.kind == ADAPTER:
        expect_loadable(checkpoint)
    if checkpoint.origin.kind != MODEL:
        return
    _expect_parts_agree(checkpoint, context)
    if is_left(checkpoint.config, {n: t.info for n, t in checkpoint.tensors.items()}):
        what = "config.json says that the weights are quantised, and every one is whole: loaders look for scales"
        source = as_argument(checkpoint.origin.asked)
        context.consent(Refused(LEFT, what, where=show(source), next=Command("doctor", (source,))))
    found = judge(checkpoint)
    if found.refused:
        source = as_argument(checkpoint.origin.asked)
        context.consent(Refused(CONFIG_REFUSED, found.unknown, where=show(source), next=Command("doctor", (source,))))
    if found.unknown:
        context.note("info", FAMILY_UNKNOWN, found.unknown)
    for code in found.codes:
        context.consent(_refusal(code, found, checkpoint))


def _expect_parts_agree(checkpoint: Checkpoint, context: Context) -> None:
    """Look at the parts of quantised weights: all are there, and what says how they are laid out goes together."""
    found = found_in(checkpoint)
    expect_parts(found, show(checkpoint.origin.asked))
    if not found.weights or found.unsupported:
        return
    try:
        whole = Dequantise()(checkpoint, Context())
    except Refused as error:
        if error.code == "quantised-incomplete":
            error.next = Command("doctor", (as_argument(checkpoint.origin.asked), "--deep"))
            context.consent(error)
        elif error.code == "quantised-unsupported":
            context.note("changes-numbers", error.code, f"{error.what}: the copy is as the input is")
        return
    if MISSHAPEN in (judged := judge(whole)).codes:
        context.consent(_refusal(MISSHAPEN, judged, checkpoint))


def expect_consistent(adapter: Checkpoint, opened: Collection[Checkpoint], context: Context) -> None:
    """Compare an adapter's tensors with its own config, and where no base is opened with each other.

    Raises:
        Refused: they contradict each other (`adapter-inconsistent`, `adapter-untargeted`), or hold NaN or infinity
            (`nonfinite`), without consent.
    """
    is_alone = all(c.origin.kind != MODEL for c in opened)
    if adapter.origin.kind == ADAPTER and (refused := inconsistency(adapter, alone=is_alone)) is not None:
        refused.next = Command("doctor", (as_argument(adapter.origin.asked),))
        context.consent(refused)
    if adapter.origin.kind == ADAPTER and is_alone:
        expect_finite(adapter, context)  # a merge looks for itself


def expect_whole_adapter(adapter: Checkpoint, base: Checkpoint, context: Context) -> None:
    """Compare an adapter with the modules of its base that its config names.

    Raises:
        Refused: it holds nothing of some of them (`adapter-targets-missing`), or factors of others
            (`adapter-untargeted`), without consent.
    """
    if adapter.origin.kind != ADAPTER or base.origin.kind != MODEL:
        return
    held = {without_wrappers(n): t for n, t in adapter.tensors.items()}
    dimensions = {n: len(t.info.shape) for n, t in base.tensors.items()}
    if lost := modules_untargeted(held, adapter.config, dimensions, base.config):
        refused = Refused(UNTARGETED, untargeted_text(lost), where=show(adapter.origin.asked))
        refused.next = Command("doctor", (as_argument(adapter.origin.asked), "--base", as_argument(base.origin.asked)))
        context.consent(refused)
    if lacks := modules_missing(held, adapter.config, dimensions, base.config):
        text = (
            f"{len(lacks)} modules that adapter_config.json names are not in the adapter: {fold(lacks)}; PEFT would "
            "leave them as they begin, and the merge would have the base's"
        )
        source = as_argument(adapter.origin.asked)
        next_command = Command("doctor", (source, "--base", as_argument(base.origin.asked)))
        context.consent(Refused("adapter-targets-missing", text, where=show(adapter.origin.asked), next=next_command))


_MISFITS = frozenset(
    {"adapter-unmatched", "adapter-shape", "adapter-incomplete", "adapter-key-twice", "adapter-rank", "adapter-bias"}
)


def expect_adapter_fits(adapter: Checkpoint, opened: Collection[Checkpoint], context: Context) -> None:
    """Compare an adapter that is about to be written with its base, by headers: every factor's module and shape.

    The base is the one that was given, else what the adapter records, where that is at hand; else it is noted that
    nothing was compared.

    Raises:
        Refused: it does not fit the base, by the code that a merge refuses it with, without consent.
    """
    if adapter.origin.kind != ADAPTER:
        return
    base = _base_at_hand(adapter, opened)
    if base is None:
        _not_compared(context, "none is at hand; --base names one")
        return
    try:
        MergeLora((adapter,))(base, _OfHeaders(context.allow))
        expect_whole_adapter(adapter, base, context)
    except Refused as error:
        if error.code in (*_MISFITS, "adapter-targets-missing"):
            context.consent(error)
        else:
            _not_compared(context, error.what)
    except UsageError as error:
        _not_compared(context, error.what)


T = TypeVar("T")


class _OfHeaders(Context):
    """Looks at values that are stored; what is yet to be computed is taken to be finite and not zero."""

    def is_zero(self, tensor: LazyTensor) -> bool:
        """False for what is yet to be computed."""
        try:
            return super().is_zero(tensor)
        except Refused as error:
            return _expect_computed(error, False)

    def nonfinite(self, tensor: LazyTensor) -> int:
        """None in what is yet to be computed."""
        try:
            return super().nonfinite(tensor)
        except Refused as error:
            return _expect_computed(error, 0)


def _expect_computed(error: Refused, taken: T) -> T:
    if error.code != "read-computed":
        raise error
    return taken


def _base_at_hand(adapter: Checkpoint, opened: Collection[Checkpoint]) -> Checkpoint | None:
    given = [c for c in opened if c.origin.kind == MODEL and c.origin.path != adapter.origin.path]
    if given:
        return given[-1]
    try:
        return open_recorded_base(adapter, keep_code=False)
    except ConvertError:
        return None


def _not_compared(context: Context, why: str) -> None:
    context.note("info", "adapter-not-compared", f"the adapter is not compared with a base: {why}")


def _refusal(code: str, found: Judgement, checkpoint: Checkpoint) -> Refused:
    asked = checkpoint.origin.asked
    source = as_argument(asked)
    doctor = Command("doctor", (source,))
    fill = Command("repair", (source, "OUT", "--base", "BASE"))
    is_folder = checkpoint.origin.stored_format in ("safetensors", "torch")  # repair is for those, not for shards
    is_hole = code == MISSING and not found.prefix and is_folder and not found.comparison.is_renamed
    expected = None
    found = found if is_folder else dataclasses.replace(found, slices=None)
    if code == MISSHAPEN and found.slices is not None:
        expected = f"all {found.slices.ranks} ranks' files, gathered"
    return Refused(code, found.words(code), where=show(asked), expected=expected, next=fill if is_hole else doctor)
