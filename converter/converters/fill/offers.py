"""What another place holds of a broken checkpoint, by the broken one's names: an offer, and what it is worth."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from converter.converters.fill.damage import beside_name, is_spare
from converter.converters.fill.evidence import differing, is_empty, same, step_of, step_relation, whole_in_both
from converter.converters.gather.adapter_config import HEADS
from converter.converters.gather.peft_names import PeftNames, has_factors, peft_names, without_wrappers
from converter.core.checkpoint import Checkpoint
from converter.core.context import Context
from converter.core.tensors.dtypes import DType
from converter.core.tensors.nodes import Cast, LazyTensor
from converter.families.memory_names import Architecture, architecture
from converter.families.words import PEFT_PREFIX
from converter.text import fold, show

TRAINING, ADAPTER = "training", "adapter"
VALUE_HEAD = "v_head."
TELLING = 16
"""Elements that a trained matrix must have for its equality to mean something."""

Verdict = Literal["exact", "unproved", "older", "other"]


@dataclass(frozen=True)
class Offer:
    """Tensors of another place by the broken checkpoint's names.

    Attributes:
        label: the place in words, for screens and the receipt: no path of this machine.
        path: the place as the user would type it.
        tensors: those that it holds whole.
        trained: names that it records as trained; all where it records none.
        frozen: names that it records as frozen, whether it holds them or not.
        needed: names without which the adapter or the model is not whole.
        unclear: names that it holds, but whose values may not be the ones that were saved, with the reason.
        peft: how the run's names are those of an adapter.
        verdict: `exact`: the same step; `unproved`: nothing speaks against it, and nothing for it; `older`: another
            step of the run; `other`: another model.
        why: what the verdict rests on.
    """

    given: Checkpoint
    label: str
    path: str
    tensors: Mapping[str, LazyTensor]
    trained: frozenset[str] = frozenset()
    frozen: frozenset[str] = frozenset()
    needed: frozenset[str] = frozenset()
    unclear: Mapping[str, str] = field(default_factory=dict)
    peft: PeftNames | None = None
    verdict: Verdict = "exact"
    why: str = ""

    def words(self, name: str) -> str:
        """Where a tensor comes from, as the receipt says it."""
        tensor = self.tensors[name]
        if self.given.origin.kind != TRAINING:
            return f"{self.label}: the same tensor"
        if name not in self.trained:
            return f"{self.label}: frozen weight"
        if isinstance(tensor, Cast) and tensor.source.info.dtype is DType.F32:
            return f"{self.label}: fp32 master, rounded to {tensor.dtype.torch_name}"
        return f"{self.label}: trained weight"


def offer_of(broken: Checkpoint, given: Checkpoint) -> Offer:
    """What a trainer's state, a model or an adapter holds, judged by names and shapes alone."""
    offer = _of_training(broken, given) if given.origin.kind == TRAINING else _of_copy(given)
    why = _unlike(broken, offer)
    return dataclasses.replace(offer, verdict="other", why=why) if why else offer


def label_of(given: Checkpoint) -> str:
    """`checkpoint-500/global_step500 (ZeRO-3, 4 ranks)`."""
    path = Path(given.origin.path)
    above = path.parent.name if step_of(path.parent.name) is not None or path.name == "actor" else ""
    name = show(f"{above}/{path.name}" if above else given.origin.name)
    return f"{name} ({given.origin.stored_format})" if given.origin.kind == TRAINING else name


def _of_training(broken: Checkpoint, given: Checkpoint) -> Offer:
    names, _ = without_wrappers(given.tensors)
    plain = {n: raw for raw, n in names.items()}
    inside = {raw: n for raw, n in names.items() if PEFT_PREFIX in n or not n.startswith(VALUE_HEAD)}
    peft = peft_names(inside, show(given.origin.asked)) if has_factors(names.values()) else None
    unclear: dict[str, str] = {}
    if peft is None:
        reach = _aligned(plain, broken)
        needed = _must_be_saved(reach, broken, given) if reach == plain else frozenset()
    elif broken.origin.kind == ADAPTER:
        reach = {f"{PEFT_PREFIX}{n}": raw for n, raw in peft.base.items()} | plain
        reach |= {f.key: f.raw for f in peft.factors}
        needed = frozenset(f.key for f in peft.factors)
    elif has_factors(broken.tensors):
        reach, needed = plain, _must_be_saved(plain, broken, given)
    else:
        reach, needed = _unmerged(peft), frozenset()
        text = "LoRA changed this weight in the run: whether it was merged when this was saved, no file says"
        unclear = {f"{m}.weight": text for m in peft.targets}
    reach |= _heads_beside(plain, broken)
    whole = {n: given.tensors[raw] for n, raw in reach.items() if not is_empty(given.tensors[raw])}
    held = given.trained
    frozen = {n for n, raw in reach.items() if held is not None and raw not in held}
    if held is not None and _lists_all_trained(broken, reach, held, peft):
        # `exclude_frozen_parameters` leaves frozen names out; whatever was trained is in `param_shapes`.
        frozen |= {n for n in broken.tensors if n not in reach and n not in unclear}
    return Offer(
        given,
        label_of(given),
        given.origin.asked,
        {n: t for n, t in whole.items() if n not in unclear},
        trained=frozenset(n for n, raw in reach.items() if held is None or raw in held),
        frozen=frozenset(frozen),
        needed=needed,
        unclear=unclear,
        peft=peft,
    )


def _must_be_saved(reach: Mapping[str, str], broken: Checkpoint, given: Checkpoint) -> frozenset[str]:
    """Names that a folder of this model can't do without: trained ones. Buffers need not be saved, nor a name that
    shares the parameter of one that is there.
    """
    shared = {raw for group in given.ties if any(reach.get(n) in group for n in broken.tensors) for raw in group}
    return frozenset(n for n, raw in reach.items() if given.trained and raw in given.trained and raw not in shared)


def _lists_all_trained(
    broken: Checkpoint, reach: Mapping[str, str], held: Collection[str], peft: PeftNames | None
) -> bool:
    """True where the run's trained tensors are tensors of the broken checkpoint under the same names.

    Then a tensor that the run does not list as trained was not trained, and is not a trained one under another name.
    """
    if broken.origin.kind != ADAPTER and peft is not None and not has_factors(broken.tensors):
        return all(f.kind != "modules_to_save" or f"{f.module}.{f.leaf}" in broken.tensors for f in peft.factors)
    known = {n for group in broken.ties for n in group} | broken.tensors.keys() | broken.dropped.keys()
    known |= {beside_name(file, n) for file, tensors in broken.beside.items() for n in tensors}
    wanted = {raw for n, raw in reach.items() if n in known}
    return all(raw in wanted for raw in held)


def _unmerged(peft: PeftNames) -> dict[str, str]:
    """Names of a whole model under PEFT: what was trained whole takes the place of the base's."""
    return peft.base | {f"{f.module}.{f.leaf}": f.raw for f in peft.factors if f.kind == "modules_to_save"}


def _aligned(plain: Mapping[str, str], broken: Checkpoint) -> dict[str, str]:
    """The run's names as the broken checkpoint has them: a wrapper's component taken off, and those of transformers.

    transformers saves many families under other names than they have in memory (LLaVA, GPT-NeoX).
    """
    wanted = broken.tensors.keys()
    named = broken.config.get("architectures")
    built = architecture(named[0], broken.config) if isinstance(named, list) and named else None
    starts = ["", *sorted({f"{n.partition('.')[0]}." for n in plain})]
    cuts = [{n.removeprefix(s): raw for n, raw in plain.items() if n.startswith(s)} for s in starts]
    found = [c if built is None else _as_saved(c, wanted, built) for c in cuts]
    return max(found, key=lambda reach: sum(n in reach for n in wanted))


def _as_saved(plain: dict[str, str], wanted: Collection[str], built: Architecture) -> dict[str, str]:
    """Names in memory replaced by those on disk; tensors whose values change on the way are left out."""
    met: set[int] = set()
    renamed = {n: built.in_memory(n, met) for n in sorted(wanted)}
    moved = {n: memory for n, (memory, change) in renamed.items() if change is None and n != memory}
    found = {n: raw for n, raw in plain.items() if n not in moved.values() or n in wanted}
    found |= {n: plain[memory] for n, memory in moved.items() if memory in plain}
    return {n: raw for n, raw in found.items() if n not in renamed or renamed[n][1] is None}


def _heads_beside(plain: Mapping[str, str], broken: Checkpoint) -> dict[str, str]:
    """A value head in a file of its own, by the run's name for it, with or without a wrapper before."""
    found = {}
    for file, tensors in broken.beside.items():
        for name in tensors:
            ends = [raw for n, raw in plain.items() if n == name or n.endswith(f".{name}")]
            if len(ends) == 1:
                found[beside_name(file, name)] = ends[0]
    return found


def _of_copy(given: Checkpoint) -> Offer:
    whole = {n: t for n, t in given.tensors.items() if t.info.numel}
    return Offer(given, label_of(given), given.origin.asked, whole)


def spare_offers(broken: Checkpoint) -> list[Offer]:
    """Weight files in the folder itself that nobody reads, as offers."""
    found = []
    for file, tensors in broken.beside.items():
        if is_spare(broken, file):
            made = dataclasses.replace(broken.origin, kind=f"{broken.origin.kind} in another file")
            offer = _of_copy(broken.replace(tensors=dict(tensors), origin=made))
            offer = dataclasses.replace(offer, label=f"{show(file)} beside it", path=show(file))
            found.append(offer)
    return found


def judged(broken: Checkpoint, offer: Offer, context: Context) -> Offer:
    """The offer with its verdict, from the values of what is whole in both and from the steps that names record."""
    if offer.verdict == "other":
        return offer
    relation = step_relation(broken, offer.given)
    both = whole_in_both(broken.tensors, offer.tensors)
    wrong = differing(context, {n: broken.tensors[n] for n in both}, offer.tensors)
    if offer.given.origin.kind == TRAINING:
        verdict: Verdict
        verdict, why = _of_state(broken, offer, relation, both, wrong)
    elif wrong:
        verdict, why = "other", f"{len(wrong)} of {len(both)} tensors that both hold whole differ: {fold(wrong)}"
    elif relation == "other":
        verdict, why = "other", "it is of another step"
    else:
        verdict, why = "unproved", f"{len(both)} tensors that both hold whole are equal"
    return dataclasses.replace(offer, verdict=verdict, why=why)


def _unlike(broken: Checkpoint, offer: Offer) -> str:
    """In words, names or shapes that show another model; a flat tensor may be one rank's piece and shows nothing."""
    if offer.given.origin.kind != TRAINING:
        return "" if not broken.tensors or broken.tensors.keys() & offer.tensors.keys() else "it has none of the names"
    if broken.origin.kind == ADAPTER and offer.peft is None:
        return "its run trained no LoRA"
    known = [n for n in broken.tensors if n in offer.tensors or n in offer.frozen or n in offer.unclear]
    if len(known) * 2 < len(broken.tensors):
        return f"it knows {len(known)} of {len(broken.tensors)} tensors by name"
    whole = {n: t.info.shape for n, t in broken.tensors.items() if n in offer.tensors and len(t.info.shape) > 1}
    wrong = [n for n, shape in whole.items() if offer.tensors[n].info.shape != shape]
    return f"other shapes: {fold(wrong)}" if wrong else ""


def is_of_run(broken: Checkpoint, given: Checkpoint) -> bool:
    """True for shards in the folder that is repaired, or below the one that it lies in."""
    folder = Path(broken.origin.path)
    return any(p in (folder, folder.parent) for p in Path(given.origin.path).parents)


def _of_state(
    broken: Checkpoint, offer: Offer, relation: str, both: list[str], wrong: list[str]
) -> tuple[Verdict, str]:
    fixed = [n for n in wrong if n in offer.frozen]
    if fixed:
        return "other", f"frozen tensors differ: {fold(fixed)}"
    if wrong and relation == "same":
        return "other", f"{len(wrong)} of {len(both)} tensors that both hold whole differ, at one step: {fold(wrong)}"
    if wrong:
        return "older", f"{len(wrong)} of {len(both)} tensors that both hold whole differ: {fold(wrong)}"
    if relation == "other":
        return "older", "its folder names another step"
    if relation == "same" and is_of_run(broken, offer.given):
        return "exact", f"the same step; {len(both)} tensors that both hold whole are equal"
    if any(n in offer.trained and is_telling(n, offer.tensors[n]) for n in both):
        return "exact", f"{len(both)} tensors that both hold whole are equal, trained matrices among them"
    where = "the step is the same, the run's folder is not" if relation == "same" else "no step is recorded"
    return "unproved", f"{where}, and {len(both)} tensors that both hold whole prove nothing"


def is_telling(name: str, tensor: LazyTensor) -> bool:
    """True for a trained tensor that another step has other values of: matrices and factors, not norms of bf16."""
    is_matrix = len(tensor.info.shape) > 1 and tensor.info.numel >= TELLING
    return is_matrix or any(part in HEADS for part in name.split("."))


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
