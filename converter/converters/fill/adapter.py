"""What an adapter needs beside its own tensors: the weight of a head that was random, frozen and never saved."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converter.converters.fill.damage import has_headless_class, heads_without_weight
from converter.converters.fill.evidence import is_comparable, is_empty
from converter.converters.fill.offers import Offer
from converter.converters.gather.adapter_config import HEADS, with_folded_heads
from converter.converters.gather.gather import Gather
from converter.core.checkpoint import Checkpoint, SideFile
from converter.core.context import Context
from converter.core.files.names import ADAPTER_CONFIG
from converter.core.tensors.nodes import LazyTensor
from converter.errors import Refused
from converter.families.factors import factor_names, zero_factors
from converter.families.words import PEFT_PREFIX
from converter.text import fold


@dataclass(frozen=True)
class Heads:
    """Heads of an adapter whose frozen weight it does not hold.

    Attributes:
        under_lora: modules of the form W0 + BA.
        alone: modules with no tensor in the adapter at all; `score` stands for one whose name nothing records.
    """

    under_lora: tuple[str, ...] = ()
    alone: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Both kinds."""
        return self.under_lora + self.alone


def lost_heads(adapter: Checkpoint, base: Checkpoint | None, offers: list[Offer]) -> Heads:
    """The heads that a base model does not bring: its classes have none unless it is a reward model itself."""
    in_base = set() if base is None else {n.removesuffix(".weight") for n, t in base.tensors.items() if t.info.numel}
    under = tuple(h for h in heads_without_weight(adapter) if h not in in_base)
    alone: tuple[str, ...] = ()
    if has_headless_class(adapter) and not in_base & HEADS:
        recorded = {n.removesuffix(".weight") for o in offers if o.peft for n in o.peft.base if n.endswith(".weight")}
        alone = tuple(sorted(recorded & HEADS)) or ("score",)
    return Heads(under, alone)


def weight_of(head: str, offer: Offer) -> LazyTensor | None:
    """The frozen weight of a head, where a trainer's state kept it."""
    raw = None if offer.peft is None else offer.peft.base.get(f"{head}.weight")
    tensor = None if raw is None else offer.given.tensors[raw]
    return None if tensor is None or is_empty(tensor) else tensor


def with_heads(adapter: Checkpoint, heads: Heads, offer: Offer, context: Context) -> Checkpoint:
    """The adapter with its heads whole: folded where LoRA lies on them, since PEFT could not load W0 otherwise.

    Raises:
        Refused: what `gather` refuses of the same state.
    """
    assert offer.peft is not None
    out = dict(adapter.tensors)
    for head in heads.alone:
        weight = weight_of(head, offer)
        assert weight is not None
        out[f"{PEFT_PREFIX}{head}.weight"] = weight
    for head in heads.under_lora:
        out = {n: t for n, t in out.items() if not n.startswith(f"{PEFT_PREFIX}{head}.")}
        out[f"{PEFT_PREFIX}{head}.weight"] = _gathered(adapter, offer).tensors[f"{PEFT_PREFIX}{head}.weight"]
    config: dict[str, Any] = with_folded_heads(adapter.config, offer.peft, heads.names)
    text = f"{fold(heads.names)} was random and frozen, and is in {offer.label} alone: saved whole (modules_to_save)"
    context.note("info", "head-folded", text)
    gone = {n: "folded into the head's whole weight" for n in adapter.tensors if n not in out}
    shards = {n: f for n, f in adapter.shards.items() if n in out}
    return adapter.replace(tensors=out, config=config, shards=shards, dropped={**adapter.dropped, **gone})


def _gathered(adapter: Checkpoint, offer: Offer) -> Checkpoint:
    """The run's adapter as `gather` makes it, under this adapter's own config."""
    own = SideFile(source=str(Path(adapter.origin.path) / ADAPTER_CONFIG))
    state = offer.given.replace(side_files={**offer.given.side_files, ADAPTER_CONFIG: own})
    return Gather("adapter")(state, Context())


def refuse_untrained(adapter: Checkpoint, context: Context, where: str) -> None:
    """Stop where every `lora_B` is zero: such an adapter is its base model, whatever else it holds.

    Raises:
        Refused: `adapter-untrained`.
    """
    found = [t for n, t in adapter.tensors.items() if any(f".{zero}" in n for zero in zero_factors())]
    others = [n for n in adapter.tensors if not any(f".{factor}" in n for factor in factor_names())]
    if found and not others and all(t.info.numel and is_comparable(t) and context.is_zero(t) for t in found):
        raise Refused(
            "adapter-untrained",
            f"all {len(found)} lora_B are zero: the adapter is its base model, and no repair makes it another",
            where=where,
            next="look for a checkpoint of the run that was saved after a step",
        )
