"""When a base model's weight is the lost one: only where it is proved that training never changed it.

A base has a tensor of the right name and shape for everything that was trained, too. That norms, or any other tensors,
are equal to the base's says nothing of a lost matrix: freezing is decided parameter by parameter. What counts:

- the run's shards list the parameter as frozen (it is in their model file and not in `param_shapes`);
- its name says that it lies under a LoRA (`base_layer`), which PEFT freezes;
- a later checkpoint of the run holds this very tensor, and bit by bit it is the base's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from converter.converters.fill.damage import Damage, is_trained_whole
from converter.converters.fill.evidence import is_comparable, is_empty, same, step_of
from converter.converters.fill.offers import ADAPTER, TRAINING, Offer, is_of_run, label_of
from converter.converters.gather.peft_names import has_factors
from converter.core.checkpoint import Checkpoint
from converter.core.context import Context
from converter.core.tensors import nodes as tensors
from converter.core.tensors.nodes import Cast, LazyTensor
from converter.diagnostic import Again, Steps
from converter.errors import Refused
from converter.families.words import LORA_EMBEDDING_PAIR, LORA_PAIR, PEFT_PREFIX
from converter.text import fold, show

_BASE_LAYER = ".base_layer."
_LOOKED_AT = 1 << 12
"""Elements of a tensor that are looked at for whether they vary."""


@dataclass(frozen=True)
class Proved:
    """A base's tensor and what proves that training kept it; `is_compared` where its values themselves were."""

    tensor: LazyTensor
    proof: str
    is_compared: bool = False


@dataclass(frozen=True)
class Base:
    """A base model beside a broken checkpoint, and what proves that tensors of it were never trained."""

    broken: Checkpoint
    given: Checkpoint
    offers: Sequence[Offer]
    context: Context

    def name_of(self, name: str) -> str | None:
        """The base's name for a tensor of the broken checkpoint."""
        plain = name.removeprefix(PEFT_PREFIX).replace(_BASE_LAYER, ".")
        return plain if plain in self.given.tensors else None

    def find(self, damage: Damage, filled: Mapping[str, LazyTensor]) -> Proved | str:
        """The base's tensor and what proves it, or why it is not the lost one; empty: the base has none such."""
        name = damage.name
        inner = self.name_of(name)
        if inner is None:
            return ""
        proof = self._proof(name, inner)
        if proof is None:
            return self._unproved(name)
        tensor = proof.tensor
        wanted = damage.expected or self._shape_under_lora(name, filled)
        if wanted is not None and wanted != tensor.info.shape:
            return f"the base's is {list(tensor.info.shape)}, and it was {list(wanted)}"
        if wanted is None and self.broken.origin.kind == ADAPTER:
            return "its shape is not recorded, and the vocabulary may have been changed"
        return proof

    def _proof(self, name: str, inner: str) -> Proved | None:
        own = self.given.tensors[inner]
        for offer in self.offers:
            if self._is_witness(offer) and name in offer.frozen and name not in offer.trained:
                return Proved(own, f"{offer.label} does not list it as trained")
        if _BASE_LAYER in name and (self.broken.origin.kind == ADAPTER or has_factors(self.broken.tensors)):
            return Proved(own, "it lies under a LoRA")
        for offer in self.offers:
            if self._is_later_checkpoint(offer) and inner in offer.tensors:
                other = offer.tensors[inner]
                if other.info == own.info and self._was_trained(offer) and self.context.equal(other, own):
                    text = f"{offer.label}, a later checkpoint of the run, holds the base's values"
                    return Proved(own, text, is_compared=True)
        return None

    def _is_witness(self, offer: Offer) -> bool:
        """True for a state of this run, of whatever step: what is trained does not change from step to step."""
        if offer.given.origin.kind != TRAINING:
            return False
        return offer.verdict == "exact" or (offer.verdict == "older" and is_of_run(self.broken, offer.given))

    def _is_later_checkpoint(self, offer: Offer) -> bool:
        ours, theirs = Path(self.broken.origin.path), Path(offer.given.origin.path)
        if offer.given.origin.kind == TRAINING or ours.parent != theirs.parent:
            return False
        steps = step_of(ours.name), step_of(theirs.name)
        return steps[0] is not None and steps[1] is not None and steps[1] > steps[0]

    def _was_trained(self, offer: Offer) -> bool:
        """True where some matrix of a checkpoint is not the base's: else it may be the base itself."""
        matrices = [n for n, t in offer.tensors.items() if len(t.info.shape) > 1 and n in self.given.tensors]
        return any(not same(self.context, offer.tensors[n], self.given.tensors[n]) for n in matrices)

    def _shape_under_lora(self, name: str, filled: Mapping[str, LazyTensor]) -> tuple[int, ...] | None:
        """The shape of a weight, by the factors on top of it."""
        stem = name.rpartition(_BASE_LAYER)[0]
        for pair, leaf in ((LORA_PAIR, ".weight"), (LORA_EMBEDDING_PAIR, "")):
            a, b = (filled.get(f"{stem}.{factor}{leaf}") for factor in pair)
            if a is not None and b is not None and len(a.info.shape) == len(b.info.shape) == 2:
                across = (b.info.shape[0], a.info.shape[1])
                return across if leaf else across[::-1]
        return None

    def _unproved(self, name: str) -> str:
        if any(name in o.trained for o in self.offers):
            return "it was trained: the base's is another tensor"
        module = name.removeprefix(PEFT_PREFIX).rpartition(".")[0]
        if self.broken.origin.kind == ADAPTER:
            if is_trained_whole(module, self.broken.config):
                return "it was trained (modules_to_save): the base's is another tensor"
            return "an adapter keeps it only where it was changed: the base's may be another tensor"
        return "nothing proves that it was frozen: the base's may be another tensor"

    def check_revision(self, names: Sequence[str]) -> None:
        """Compare frozen tensors that are still whole with the base's before any of it is used.

        Raises:
            Refused: they differ: another revision, or another model (`repair-mismatch`).
        """
        whole: dict[str, tuple[LazyTensor, LazyTensor]] = {}
        for offer in (o for o in self.offers if self._is_witness(o)):
            for name in sorted(offer.frozen):
                inner = self.name_of(name)
                own = self.broken.tensors.get(name, offer.tensors.get(name))
                own = offer.tensors.get(name) if own is None or is_empty(own) else own
                if own is None or not is_comparable(own):
                    continue
                if inner is not None and own.info.shape == self.given.tensors[inner].info.shape:
                    whole[name] = own, self.given.tensors[inner]
        wrong = [n for n, (own, theirs) in whole.items() if not same(self.context, own, theirs)]
        if wrong:
            raise Refused(
                "repair-mismatch",
                f"the base is not the one that training began with: {len(wrong)} of {len(whole)} frozen tensors differ "
                f"from it: {fold(wrong)}",
                where=show(self.given.origin.asked),
                next=Steps("give the revision of training: ", Again(("--base", "OWNER/NAME@COMMIT"))),
            )
        if not any(self._is_varied(own) for own, _ in whole.values()):
            self.context.consent(
                Refused(
                    "base-unchecked",
                    f"{fold(names)} would come from {label_of(self.given)}, and no frozen tensor is left whole "
                    "that could show that this is the model that training began with",
                    where=show(self.broken.origin.asked),
                    next=Steps("shards that were saved with frozen parameters: ", Again(("--weights-from", "DIR"))),
                )
            )

    def _is_varied(self, tensor: LazyTensor) -> bool:
        """True for a tensor that can tell two models apart: not one number everywhere, as norms are before training."""
        width = tensor.info.dtype.bits // 8
        head = tensors.narrow(tensors.reshape(tensor, (tensor.info.numel,)), 0, 0, min(tensor.info.numel, _LOOKED_AT))
        if isinstance(head, Cast):
            return True
        raw = self.context.read(head)
        return raw != raw[:width] * (len(raw) // width)
