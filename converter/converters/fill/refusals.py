"""What a repair says where it can't help: tables of what is lost and why, and what would help."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from converter.converters.fill.damage import Damage, is_trained_whole
from converter.converters.fill.offers import ADAPTER, TRAINING, Offer
from converter.converters.gather.adapter_config import HEADS
from converter.core.checkpoint import Checkpoint
from converter.diagnostic import Again, Command, Next, Steps
from converter.errors import ConvertError, Refused
from converter.families.words import PEFT_PREFIX
from converter.text import fold, show

HEAD = "the head's frozen weight was random and never saved: no base model has it"
_ADVICE = (
    "If loading says that shapes differ from torch.Size([0]), the loader is at fault, not the file: it runs under "
    "ZeRO-3 (zero.Init), where parameters are empty until they are gathered. Load before DeepSpeed is set up, or "
    "inside deepspeed.zero.GatheredParameters. ignore_mismatched_sizes can't cure it: it starts from random weights"
)


class NothingToRepair(ConvertError):
    """Every tensor is whole (exit code 0)."""

    exit_code: ClassVar[int] = 0

    def __init__(self, checkpoint: Checkpoint) -> None:
        count = len(checkpoint.tensors)
        what = f"nothing to repair: all {count} tensors are whole by their headers. Nothing was written"
        super().__init__("nothing-to-repair", what, where=show(checkpoint.origin.asked), next=_ADVICE)


def why_lost(name: str, broken: Checkpoint) -> str:
    """The cause, where no place has anything of that name."""
    module = name.removeprefix(PEFT_PREFIX).rpartition(".")[0]
    if broken.origin.kind != ADAPTER and name.partition(".")[0] in HEADS:
        return "the head: no base model has it, and a fresh one is random"
    if broken.origin.kind != ADAPTER:
        return "trained, or not proved frozen: only the run's shards or a copy hold it"
    if is_trained_whole(module, broken.config):
        return "trained whole (modules_to_save): the base's is another tensor"
    if ".lora_" in name:
        return "trained by LoRA: no base model has it, and zeros would be the base model"
    return "trained: only the run's shards hold it"


def refuse_lost(
    broken: Checkpoint,
    damage: Mapping[str, Damage],
    causes: Mapping[str, str],
    offers: Sequence[Offer],
    total: int,
) -> None:
    """Stop with a table of what is lost, by cause.

    Raises:
        Refused: `repair-mismatch` where all places are of another model, `head-base-lost` where only heads are lost,
            else `tensors-lost`.
    """
    asked = show(broken.origin.asked)
    groups: dict[str, list[str]] = {}
    for name, cause in causes.items():
        groups.setdefault(cause, []).append(name)
    rows = [
        f"\n    {len(names)} x {cause}\n      {fold(names)}{_shapes(names, damage)}" for cause, names in groups.items()
    ]
    is_any_state = any(o.given.origin.kind == TRAINING for o in offers)
    looked = [f"\n    {o.path}: {o.why}" for o in offers]
    got = f"in {len(offers)} {'place' if len(offers) == 1 else 'places'}:{''.join(looked)}" if looked else None
    if is_any_state and damage and all(o.verdict == "other" for o in offers):
        raise Refused(
            "repair-mismatch",
            f"the weights found are not of this checkpoint, and {len(damage)} tensors are lost:{''.join(rows)}",
            where=asked,
            got=got,
            next=_helps(broken.origin.asked),
        )
    only_heads = not damage
    code = "head-base-lost" if only_heads else "tensors-lost"
    what = f"{len(causes)} of {total} lost tensors are in no place that was looked at:{''.join(rows)}"
    no_cure = "\n    no cure: ignore_mismatched_sizes, zeros, a fresh initialisation: each makes another model"
    raise Refused(code, what + no_cure, where=asked, got=got, next=_helps(broken.origin.asked, head=only_heads))


def _shapes(names: Sequence[str], damage: Mapping[str, Damage]) -> str:
    found = list(dict.fromkeys(damage[n].found for n in names if n in damage))
    wanted = list(
        dict.fromkeys(str(list(d)) for n in names if n in damage and (d := damage[n].expected or damage[n].likely))
    )
    tail = f", expected {', '.join(wanted[:4])}" if wanted else ""
    return f"  ({', '.join(found[:4])}{tail})" if found else ""


def _helps(asked: str, *, head: bool = False) -> Next:
    base = ", or --base BASE if the base is a reward model that has the head" if head else ""
    where = f"; --weights-from names the run's DeepSpeed folder (global_step*), where there is one{base}"
    return Steps(Command("inspect", (asked, "--tensors")), f" lists every tensor that is there{where}")


def older_weights(broken: Checkpoint, older: Offer, names: Sequence[str]) -> Refused:
    """The refusal of weights of another step, to which a user may consent."""
    return Refused(
        "older-weights",
        f"{len(names)} lost tensors are only in {older.label}, which is of another step ({older.why}). With consent "
        "all trained tensors are taken from it, and the result is that step, not this one",
        where=show(broken.origin.asked),
        next=Steps(Command("gather", (older.path, "OUT")), " makes the same of it, whole"),
    )


def refuse_several(broken: Checkpoint, offers: Sequence[Offer]) -> Refused:
    """The refusal where two steps could be the one, and nothing tells which."""
    listed = ", ".join(show(o.path) for o in offers)
    return Refused(
        "step-unknown",
        f"{len(offers)} states of the run hold what is lost, and nothing tells which is of the same step",
        where=show(broken.origin.asked),
        expected=f"one of {listed}",
        next=Again(
            ("--weights-from", offers[-1].path),
            otherwise=Command("repair", (broken.origin.asked, "OUT", "--weights-from", offers[-1].path)),
        ),
    )
