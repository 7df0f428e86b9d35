"""`remap-head`: a reward or critic model of any trainer becomes one of another, its head's numbers kept."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from converter.converters.heads.detect import HEADLESS, Detected, detect, head_like
from converter.converters.heads.fit import BiasWish, Init, NormaliserWish, Wishes, fit, fresh
from converter.converters.heads.model import Reading, main_dtype
from converter.converters.heads.plain import named_head
from converter.converters.heads.read import read
from converter.converters.heads.whole import MISSING, UNEXPECTED, judge
from converter.converters.heads.write import write
from converter.core.checkpoint import Checkpoint, Input
from converter.core.context import Context
from converter.diagnostic import Command, as_argument
from converter.dialects.known import Target, dialects, spoken, target
from converter.dialects.spec import Dialect, HeadSpec, Role
from converter.errors import Refused, UsageError
from converter.text import fold, show

_TRL = "pretrained_model."


@dataclass(frozen=True)
class RemapHead:
    """Read the head in whatever dialect it is, and write it in the target's.

    Attributes:
        to: `TRAINER` or `TRAINER@VERSION`, or a dialect's own name.
        role: what the trainer uses the model as.
        read_as: the source's dialect or trainer, where files don't tell.
        head: the source's head is the linear layer of this name.
        adapter: the source is this adapter over the checkpoint that flows through.
        base: where a missing output embedding comes from.
        weights: where tensors that are empty or missing may still exist; they are filled first.
        bias: what to do with a constant that the target has no place for.
        normaliser: `fold`: mean and std go into the head where config.json can't keep them; `drop`: they are left out.
        label, label_weights: one row of several, or a fixed sum of them.
        lora_alpha: the alpha of training, for an adapter that records none or 0.
        init_head: a fresh head where the source has none: `zeros`, or `normal` from `seed`.
    """

    name: ClassVar[str] = "remap-head"
    config_will_do: ClassVar[frozenset[str]] = frozenset({"base"})

    to: str
    role: Role = "critic"
    read_as: str | None = None
    head: str | None = None
    adapter: Input | None = None
    base: Input | None = None
    weights: tuple[Input, ...] = ()
    bias: BiasWish = "refuse"
    normaliser: NormaliserWish = "fold"
    label: int | None = None
    label_weights: tuple[float, ...] = ()
    init_head: Init = "none"
    seed: int = 0
    lora_alpha: float | None = None

    def __call__(self, checkpoint: Checkpoint, context: Context) -> Checkpoint:
        """The model as the target reads it.

        Raises:
            UsageError: the target or the source's dialect isn't known or isn't clear.
            Refused: the head is lost, or has no exact form in the target.
        """
        wishes = self._wishes()
        aim = target(self.to, self.role)
        spec = aim.dialect.head_of(self.role)
        assert spec is not None
        if self.adapter is not None:
            from converter.converters.heads.from_adapter import with_adapter
            from converter.converters.merge.adapter_values import with_alpha

            (adapter,) = with_alpha([self._filled(self.adapter, checkpoint, context)], self.lora_alpha)
            checkpoint = with_adapter(checkpoint, adapter, wishes, context)
        else:
            checkpoint = self._filled(checkpoint, self.base, context)
        checkpoint = _unwrapped(checkpoint, context)
        found = self._dialect(checkpoint)
        reading = read(checkpoint, found.dialect, context)
        if self.read_as is not None or self.head is not None:
            reading = _without_others(reading, context)
        else:
            _expect_whole_head(checkpoint, reading, context)
        _say(found, aim, context)
        if self.role == "actor":
            return write(reading, None, aim, spec, self.base, context)
        if reading.head is None or wishes.init != "none":
            reading = self._with_fresh(reading, spec, wishes, context)
        return write(reading, fit(reading, aim, spec, wishes, context), aim, spec, self.base, context)

    def _filled(self, checkpoint: Checkpoint, base: Checkpoint | None, context: Context) -> Checkpoint:
        """The checkpoint with what it lost, from the places that the user named; one that is whole stays as it is."""
        if not self.weights:
            return checkpoint
        # Merging and filling are much code, which most conversions do without.
        from converter.converters.fill.fill import Fill
        from converter.converters.fill.refusals import NothingToRepair

        try:
            return Fill(weights=self.weights, base=base)(checkpoint, context)
        except NothingToRepair:
            context.note("info", "fill", "every tensor is whole: --weights-from has nothing to fill")
        aside = {w.origin.path: "nothing was missing" for w in self.weights}
        return checkpoint.replace(set_aside={**checkpoint.set_aside, **aside})

    def _wishes(self) -> Wishes:
        if self.label is not None and self.label_weights:
            raise UsageError("usage", "--label and --label-weights are two ways to say one thing; give one")
        return Wishes(self.bias, self.normaliser, self.label, self.label_weights, self.init_head, self.seed)

    def _dialect(self, checkpoint: Checkpoint) -> Detected:
        """The source's dialect, from the files or as the user says."""
        if self.head is not None:
            if self.read_as is not None:
                raise UsageError("usage", "--from and --head are two ways to say what the head is; give one")
            return Detected(named_head(checkpoint, self.head), f"--head {show(self.head)}")
        if self.read_as is None:
            return detect(checkpoint) or Detected(dialects()[HEADLESS], "no head")
        named = spoken(self.read_as)
        if len(named) == 1:
            return Detected(named[0], f"--from {self.read_as}")
        found = detect(checkpoint)
        if found is not None and found.dialect in named:
            return Detected(found.dialect, f"--from {self.read_as}, and {found.reason}")
        listed = " or ".join(f"--from {d.name}" for d in named)
        what = f"{show(self.read_as)} stores heads in {len(named)} ways, and the files show none of them"
        raise UsageError("dialect-ambiguous", what, where=show(checkpoint.origin.asked), expected=listed)

    def _with_fresh(self, reading: Reading, spec: HeadSpec, wishes: Wishes, context: Context) -> Reading:
        """The reading with a fresh head, where the source has none and the user asked for one."""
        if reading.head is not None:
            if spec.kind == "mlp" and wishes.init == "normal":
                return reading
            what = "the source has a head, and --init-head would throw it away"
            raise UsageError("usage", what, where=show(reading.checkpoint.origin.asked))
        if wishes.init == "none":
            from converter.converters.heads.from_adapter import no_head

            raise no_head(reading.checkpoint, self.adapter)
        hidden = reading.family.hidden
        if hidden is None:
            raise Refused("head-shape", "config.json doesn't say the hidden size that a head needs")
        dtype = main_dtype(reading.checkpoint)
        how = "zeros" if wishes.init == "zeros" else f"normal numbers from seed {wishes.seed}"
        text = f"the head [1, {hidden}] is fresh: {how}. It has learnt nothing: a critic to train, no reward model"
        context.consents["init-head"] = text
        context.note("changes-numbers", "init-head", text)
        return dataclasses.replace(reading, head=fresh(hidden, dtype, wishes))


def _expect_whole_head(checkpoint: Checkpoint, reading: Reading, context: Context) -> None:
    """Of the source's head all is there that its class asks for: a bias that was lost would be one that never was.

    Raises:
        Refused: a part is in no file (`tensors-missing`), without consent.
    """
    modules = {name.rpartition(".")[0] for name in reading.stored}
    if not modules:
        return
    found = judge(checkpoint)
    lost, other = ([n for n in found.names(code) if n.rpartition(".")[0] in modules] for code in (MISSING, UNEXPECTED))
    if lost:
        source = as_argument(checkpoint.origin.asked)
        what = f"the head's class asks for {fold(lost)}, which is in no file here"
        what += f"; {fold(other)} is, for which it has no place" if other else ""
        context.consent(Refused(MISSING, what, where=show(source), next=Command("doctor", (source,))))


def _unwrapped(checkpoint: Checkpoint, context: Context) -> Checkpoint:
    """TRL's wrapper with a value head, taken off: saved as a plain state dict, it names all but the head after itself.

    Raises:
        Refused: some tensors have its prefix and some of the model's have not (`backbone-name`).
    """
    names = {n: n.removeprefix(_TRL) for n in checkpoint.tensors if n.startswith(_TRL)}
    if not names:
        return checkpoint
    others = [n for n in checkpoint.tensors if n not in names and not n.startswith("v_head.")]
    if others:
        what = f"some names begin with {_TRL} and some do not: {fold(others)}"
        raise Refused("backbone-name", what, where=show(checkpoint.origin.asked))
    context.note("info", "renamed", f"{len(names)} names lose {_TRL}: TRL's wrapper with a value head")
    return checkpoint.rename(names)


def _without_others(reading: Reading, context: Context) -> Reading:
    """The reading without other heads: the user said which one is meant, and the output has one."""
    found = reading.checkpoint
    others = {n: t for n, t in found.tensors.items() if n in head_like(found.tensors)}
    if not others:
        return reading
    context.note("changes-numbers", "head-dropped", f"{fold(others)}: another head than the one that is meant")
    kept = {n: t for n, t in found.tensors.items() if n not in others}
    shards = {n: f for n, f in found.shards.items() if n in kept}
    dropped = {**found.dropped, **dict.fromkeys(others, "another head than the one that --from names")}
    return dataclasses.replace(reading, checkpoint=found.replace(tensors=kept, shards=shards, dropped=dropped))


def _say(found: Detected, aim: Target, context: Context) -> None:
    """Which dialects, on the screen and in the receipt."""
    context.note("info", "dialect-from", f"reads {found.dialect.name}: {found.reason}")
    newest = " (newest known)" if aim.version and aim.version == aim.serves.until else ""
    name = "" if aim.dialect.name == aim.serves.trainer else f", as {aim.dialect.name}"
    kind = {"reward": "a reward model", "critic": "a critic", "actor": "an actor"}[aim.role]
    context.note("info", "dialect-to", f"writes {kind} for {aim.words}{newest}{name}")


def readable() -> list[Dialect]:
    """Dialects that `remap-head` reads."""
    return [d for d in dialects().values() if not d.refused]
