"""`fill`: lost tensors of a model or an adapter, each from the first place that holds exactly its values.

The places, in order: another file of the folder, the run's shards (fp32 masters, frozen weights), the tensor that it is
tied to, the base model where the tensor is proved frozen, a copy of the same checkpoint, and, with consent, shards of
another step. What no place holds is named, and nothing is written: a repair that would be the base model or zeros in
disguise is never offered.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from converter.converters.fill.adapter import Heads, lost_heads, refuse_untrained, weight_of, with_heads
from converter.converters.fill.base import Base, Proved
from converter.converters.fill.damage import (
    EMPTY,
    MISSING,
    Damage,
    beside_name,
    find_damage,
    is_spare,
    lacks_of_class,
    missing_heads,
    pairs_missing,
)
from converter.converters.fill.evidence import is_empty
from converter.converters.fill.offers import (
    ADAPTER,
    TRAINING,
    Offer,
    is_of_run,
    is_proved_copy,
    judged,
    label_of,
    offer_of,
    spare_offers,
)
from converter.converters.fill.refusals import (
    HEAD,
    NothingToRepair,
    older_weights,
    refuse_lost,
    refuse_several,
    why_lost,
)
from converter.converters.merge.adapter_itself import INCONSISTENT, contradictions
from converter.core.checkpoint import Checkpoint, Input
from converter.core.context import Context
from converter.core.files.opening import Identity
from converter.core.tensors import nodes as tensors
from converter.core.tensors.nodes import LazyTensor
from converter.diagnostic import Command
from converter.errors import UsageError
from converter.families.words import PEFT_PREFIX
from converter.text import show


@dataclass(frozen=True)
class Fill:
    """Fill what is empty, cut or missing from where it still exists. The recipe's source is `broken: true`.

    Attributes:
        weights: places that may hold it: a trainer's shards, copies, other checkpoints of the run.
        base: the base model, for tensors that were never trained.
    """

    name: ClassVar[str] = "fill"

    weights: tuple[Input, ...] = ()
    base: Input | None = None

    def __call__(self, checkpoint: Checkpoint, context: Context) -> Checkpoint:
        """The checkpoint with every tensor whole.

        Raises:
            UsageError: the source is a trainer's state (`training-state`).
            NothingToRepair: every tensor is whole.
            Refused: tensors that no place holds (`tensors-lost`, `head-base-lost`), places of another model
                (`repair-mismatch`) or of another step (`older-weights`), an adapter without effect
                (`adapter-untrained`).
        """
        if checkpoint.origin.kind == TRAINING:
            raise UsageError(
                "training-state",
                "this is a trainer's state: it is gathered, and needs no repair",
                where=show(checkpoint.origin.asked),
                next=Command("gather", (checkpoint.origin.asked, "OUT")),
            )
        return _Repair(checkpoint, self.weights, self.base, context).done()


def _own_inputs(given: Checkpoint) -> dict[str, Identity]:
    """The files of a place that hold weights: its config is not used, and may lie where the output does, above it."""
    unused = {file.source for file in given.side_files.values()}
    return {p: i for p, i in given.inputs.items() if p not in unused and Path(p).suffix != ".json"}


@dataclass
class _Repair:
    """One checkpoint's repair, place after place.

    Attributes:
        damage: what is still lost, by name.
        found: tensors by name, with where each comes from.
        reasons: why places that have a tensor of a lost one's name do not serve.
    """

    broken: Checkpoint
    weights: tuple[Checkpoint, ...]
    base: Checkpoint | None
    context: Context
    damage: dict[str, Damage] = field(default_factory=dict)
    found: dict[str, tuple[LazyTensor, str]] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    @property
    def beside(self) -> dict[str, LazyTensor]:
        """Tensors of the files beside the weights, by file and name."""
        return {beside_name(f, n): t for f, ts in self.broken.beside.items() for n, t in ts.items()}

    def done(self) -> Checkpoint:
        """The repaired checkpoint."""
        for said in self.broken.said:
            self.context.note("info", "found", said)
        twin = self._empty_twin()
        if twin is not None and not self._damage([]) and not self._heads([]).names:
            return self._beside_twin(twin)
        offers = [offer_of(self.broken, w) for w in self.weights]
        self._survey(offers)  # by names and shapes: values of a folder that is whole are not read
        offers = [judged(self.broken, o, self.context) for o in offers]
        heads = self._survey(offers)
        total = len(self.damage) + len(heads.names)
        states = [o for o in offers if o.given.origin.kind == TRAINING]
        spares = [judged(self.broken, o, self.context) for o in spare_offers(self.broken)]
        base = None if self.base is None else Base(self.broken, self.base, offers, self.context)
        copies = [o for o in offers if o.given.origin.kind != TRAINING]
        self._take_copies(spares)
        self._take_states(states)
        self._take_ties()
        if base is not None:
            self._take_base(base)
        self._take_copies(copies)
        head = self._state_with(heads, states)
        without_weight = () if head is not None else heads.names
        older = self._older(states)
        if older is not None and not without_weight and self._consents(older):
            return self._finished(self._from_older(older), heads, head)
        if self.damage or without_weight:
            causes = {n: self.reasons.get(n) or why_lost(n, self.broken) for n in self.damage}
            head_cause = f"{HEAD}; the run's shards were saved without frozen parameters" if states else HEAD
            causes |= dict.fromkeys((f"{h}.weight" for h in without_weight), head_cause)
            refuse_lost(self.broken, self.damage, causes, [*spares, *offers], total)
        return self._finished({n: t for n, (t, _) in self.found.items()}, heads, head)

    def _empty_twin(self) -> str | None:
        """A file of empty tensors that PEFT prefers to the whole one: OpenRLHF up to 0.5.5 left both."""
        spares = {f: ts for f, ts in self.broken.beside.items() if is_spare(self.broken, f)}
        return next((f for f, ts in spares.items() if any(is_empty(t) for t in ts.values())), None)

    def _beside_twin(self, twin: str) -> Checkpoint:
        words = f"another file of the folder, whole where {show(twin)} is empty"
        self.found = {n: (t, words) for n, t in self.broken.tensors.items()}
        return self._finished({}, Heads(), None)

    def _survey(self, offers: list[Offer]) -> Heads:
        """Note what is lost, and say which heads are.

        Raises:
            NothingToRepair: nothing is lost.
            Refused: nothing is lost of an adapter that has no effect (`adapter-untrained`).
        """
        states = [o for o in offers if o.given.origin.kind == TRAINING]
        self.damage = {d.name: d for d in (*self._contradicting(offers), *self._damage(states))}
        heads = self._heads(states)
        if not self.damage and not heads.names:
            refuse_untrained(self.broken, self.context, show(self.broken.origin.asked))
            raise NothingToRepair(self.broken)
        return heads

    def _damage(self, offers: list[Offer]) -> list[Damage]:
        known = [o for o in offers if o.verdict != "other"]
        best = min(known, key=lambda o: ("exact", "unproved", "older").index(o.verdict), default=None)
        expected: dict[str, tuple[int, ...]] = {}
        if best is not None:
            wanted = self.broken.tensors.keys() | best.needed
            expected = {n: t.info.shape for n, t in best.tensors.items() if n in wanted}
        loose: Mapping[str, tuple[int, ...]] = {}
        if self.base is not None:
            loose = {n: t.info.shape for n, t in self.base.tensors.items()}
        found = find_damage(self.broken, expected, loose)
        if self.broken.origin.kind == ADAPTER:
            here = {d.name for d in found}
            missing = [n for n in pairs_missing(self.broken.tensors) if n not in here]
            found += [Damage(n, MISSING, expected.get(n)) for n in missing]
            if not self.broken.tensors and not found:
                found.append(Damage("every tensor of the adapter", MISSING))
        elif not self.broken.tensors and not found:
            found.append(Damage("every tensor of the model", MISSING))
        else:
            here = {d.name for d in found}
            found += [Damage(n, MISSING, expected.get(n)) for n in missing_heads(self.broken) if n not in here]
            here = {d.name for d in found}
            found += [d for d in lacks_of_class(self.broken) if d.name not in here]
        return found

    def _contradicting(self, offers: list[Offer]) -> list[Damage]:
        """Factors that contradict the adapter itself, of which a copy has others."""
        ours = self.broken.tensors
        if self.broken.origin.kind != ADAPTER:
            return []
        held = {n: t.info for n, t in ours.items()}
        found = contradictions(held, self.broken.config, alone=self.base is None)
        odd = {n for each in found if each.code == INCONSISTENT for n in each.names}
        return [
            Damage(n, f"shape {list(ours[n].info.shape)}" if n in ours else MISSING, t.info.shape)
            for offer in offers
            for n, t in offer.tensors.items()
            if offer.verdict != "other"
            and (n in odd or any(f".{m}." in n for m in odd))
            and (n not in ours or ours[n].info != t.info)
        ]

    def _heads(self, states: list[Offer]) -> Heads:
        if self.broken.origin.kind != ADAPTER:
            return Heads()
        return lost_heads(self.broken, self.base, [o for o in states if o.verdict != "other"])

    def _state_with(self, heads: Heads, states: list[Offer]) -> Offer | None:
        """The state that has the weights of lost heads: of this run, whatever the step, since they were frozen."""
        for offer in states if heads.names else []:
            is_ours = offer.verdict in ("exact", "unproved") or (
                offer.verdict == "older" and is_of_run(self.broken, offer.given)
            )
            if is_ours and all(weight_of(h, offer) is not None for h in heads.names):
                if offer.verdict == "unproved":
                    self._note_unproved(offer)
                return offer
        return None

    def _fits(self, damage: Damage, tensor: LazyTensor) -> bool:
        return bool(tensor.info.numel) and damage.expected in (None, tensor.info.shape)

    def _take(self, damage: Damage, tensor: LazyTensor, words: str) -> None:
        before = self.broken.tensors.get(damage.name, self.beside.get(damage.name))
        whole = tensor if before is None else tensors.cast(tensor, before.info.dtype)
        if whole.info.dtype is not tensor.info.dtype:
            words = f"{words}, cast to {whole.info.dtype.torch_name}"
        self.found[damage.name] = whole, words
        self.damage.pop(damage.name, None)

    def _take_from(self, offer: Offer) -> None:
        for damage in list(self.damage.values()):
            tensor = offer.tensors.get(damage.name)
            if tensor is not None and self._fits(damage, tensor):
                self._take(damage, tensor, offer.words(damage.name))

    def _explain(self, offer: Offer) -> None:
        for name in self.damage:
            if name in offer.unclear:
                self._because(name, offer.unclear[name])
            elif name in offer.frozen and name not in offer.tensors:
                self._because(name, "frozen, and in no file of the run: saved without frozen parameters")

    def _take_states(self, states: list[Offer]) -> None:
        exact = [o for o in states if o.verdict == "exact"]
        unproved = [o for o in states if o.verdict == "unproved"]
        for offer in exact:
            self._take_from(offer)
        useful = [o for o in unproved if any(n in o.tensors for n in self.damage)]
        if len(useful) > 1:
            raise refuse_several(self.broken, useful)
        for offer in useful:
            self._take_from(offer)
            self._note_unproved(offer)
        for offer in [*exact, *unproved]:
            self._explain(offer)

    def _note_unproved(self, offer: Offer) -> None:
        text = f"{offer.label} is taken for the step of what is repaired: {offer.why}"
        self.context.note("changes-numbers", "step-unproved", text)

    def _take_ties(self) -> None:
        for group in self.broken.ties:
            whole = [(n, t) for n in group if (t := self._current(n)) is not None]
            for name in group:
                if name in self.damage and whole:
                    self._take(self.damage[name], whole[0][1], f"tied to {show(whole[0][0])}, as the config says")

    def _current(self, name: str) -> LazyTensor | None:
        if name in self.found:
            return self.found[name][0]
        tensor = self.broken.tensors.get(name)
        return None if tensor is None or name in self.damage or is_empty(tensor) else tensor

    def _take_base(self, base: Base) -> None:
        now = {n: t for n in self.broken.tensors if (t := self._current(n)) is not None}
        proved: dict[str, Proved] = {}
        for damage in list(self.damage.values()):
            answer = base.find(damage, now)
            if isinstance(answer, str):
                self._because(damage.name, answer)
            else:
                proved[damage.name] = answer
        unchecked = [n for n, p in proved.items() if not p.is_compared]
        if unchecked:
            base.check_revision(unchecked)
        for name, each in proved.items():
            self._take(self.damage[name], each.tensor, f"{label_of(base.given)}, the base: {each.proof}")

    def _because(self, name: str, reason: str) -> None:
        """Keep why a place that has a tensor of this name does not serve."""
        if reason:
            self.reasons[name] = f"{self.reasons[name]}; {reason}" if name in self.reasons else reason

    def _take_copies(self, copies: list[Offer]) -> None:
        for offer in copies:
            if not any(n in offer.tensors for n in self.damage):
                continue
            reason = is_proved_copy(self.broken, offer, self.base, self.context)
            if reason is None:
                self._take_from(offer)
            else:
                for name in [n for n in self.damage if n in offer.tensors]:
                    self._because(name, f"{offer.label}: {reason}")

    def _older(self, states: list[Offer]) -> Offer | None:
        """The state of another step that has all that is still lost."""
        known = [o for o in states if o.verdict == "older" and self.damage]
        return next((o for o in known if all(n in o.tensors for n in self.damage)), None)

    def _consents(self, older: Offer) -> bool:
        self.context.consent(older_weights(self.broken, older, list(self.damage)))
        return True

    def _from_older(self, older: Offer) -> dict[str, LazyTensor]:
        """All that was trained from the older state, whole tensors too: a mixture of two steps is no checkpoint."""
        known = [*self.broken.tensors, *self.found]
        replaced = list(dict.fromkeys(n for n in known if n in older.trained and n in older.tensors))
        for name in dict.fromkeys([*replaced, *self.damage]):
            found = self.damage.get(name, Damage(name, EMPTY, None))
            self._take(found, older.tensors[name], f"OLDER: {older.words(name)}")
        text = f"{len(replaced)} trained tensors are those of {older.label}, not of {show(self.broken.origin.name)}"
        self.context.note("changes-numbers", "older-weights", text)
        return {n: t for n, (t, _) in self.found.items()}

    def _finished(self, filled: Mapping[str, LazyTensor], heads: Heads, head: Offer | None) -> Checkpoint:
        broken = self.broken
        replaced = {
            n: "not whole: replaced"
            for n in filled
            if n in broken.tensors and broken.tensors[n].info.numel and filled[n] != broken.tensors[n]
        }
        spare = {f"{f}:{n}": "a spare file" for f, ts in broken.beside.items() if is_spare(broken, f) for n in ts}
        given = [*self.weights, *([] if self.base is None else [self.base])]
        aside = {w.origin.path: "only what was lost is taken from it" for w in given if w.origin.path}
        aside.pop(broken.origin.path, None)
        done = broken.replace(
            tensors={**broken.tensors, **{n: t for n, t in filled.items() if n not in self.beside}},
            dropped={**broken.dropped, **replaced, **spare},
            repaired={n: words for n, (_, words) in self.found.items()},
            set_aside={**broken.set_aside, **aside},
            inputs={**{p: i for w in given for p, i in _own_inputs(w).items()}, **broken.inputs},
            beside={
                file: {n: filled.get(beside_name(file, n), t) for n, t in tensors.items()}
                for file, tensors in broken.beside.items()
                if not is_spare(broken, file)
            },
            said=(),
        )
        if head is not None:
            done = with_heads(done, heads, head, self.context)
            names = {f"{PEFT_PREFIX}{h}.weight": f"{head.label}: frozen weight" for h in heads.alone}
            names |= {
                f"{PEFT_PREFIX}{h}.weight": f"{head.label}: frozen weight, LoRA folded in" for h in heads.under_lora
            }
            kept = {n: w for n, w in done.repaired.items() if n in done.tensors}
            done = done.replace(repaired={**kept, **names})
        if broken.origin.kind == ADAPTER:
            refuse_untrained(done, self.context, show(broken.origin.asked))
        return done
