"""Fixes of names and of stored ties: wrappers off, PEFT's own spelling, equal copies once, different ones untied."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from converter.converters.gather.gather import Gather
from converter.converters.gather.peft_names import without_wrappers
from converter.core.checkpoint import Checkpoint, Input
from converter.core.context import Context
from converter.core.tensors.nodes import LazyTensor
from converter.errors import Refused
from converter.families.expected import Unknown, expected
from converter.families.plain_names import plain_names
from converter.families.ties import is_output, ties, untied
from converter.families.words import LORA_FACTOR_WORD, PEFT_PREFIX
from converter.text import fold, show

_ADAPTER_NAME = re.compile(rf"(?P<kind>\.(?:{LORA_FACTOR_WORD}))\.(?P<name>[^.]+)(?=\.|$)")
_LEAVES = frozenset({"weight", "bias"})


@dataclass(frozen=True)
class FixNames:
    """Take wrappers (module., _orig_mod., FSDP's) and prefixes that are not theirs off the names, to a fixpoint."""

    name: ClassVar[str] = "fix-names"

    def __call__(self, checkpoint: Checkpoint, context: Context) -> Checkpoint:
        """The checkpoint under plain names; what is there with and without a wrapper is kept once where equal.

        Raises:
            Refused: two tensors with different values would get one name (`rename-collision`).
        """
        plain = plain_names(checkpoint.tensors, checkpoint.config)
        dropped: dict[str, str] = {}
        for name, (first, *rest) in plain.twice.items():
            for raw in rest:
                if not context.equal(checkpoint.tensors[first], checkpoint.tensors[raw]):
                    raise Refused(
                        "rename-collision",
                        f"without their wrappers {show(first)} and {show(raw)} are both {show(name)}, and their values "
                        "differ",
                        where=show(checkpoint.origin.asked),
                        next="find out which of the two was trained, and take the other out of the file",
                    )
                dropped[raw] = f"the same as {first}"
        if plain.taken:
            context.note("info", "fixed", "taken off the names: " + ", ".join(f"`{show(t)}`" for t in plain.taken))
        if dropped:
            context.note("info", "fixed", f"there with a wrapper and without, with equal values: {fold(dropped)}")
        kept = {n: t for n, t in checkpoint.tensors.items() if n not in dropped}
        less = checkpoint.replace(tensors=kept, dropped={**checkpoint.dropped, **dropped})
        return less.rename({raw: n for raw, n in plain.names.items() if raw not in dropped})


@dataclass(frozen=True)
class FixAdapterNames:
    """Give an adapter's tensors the names that PEFT writes and looks for."""

    name: ClassVar[str] = "fix-adapter-names"

    def __call__(self, checkpoint: Checkpoint, context: Context) -> Checkpoint:
        """The adapter under PEFT's names.

        Raises:
            Refused: two tensors would get one name (`rename-collision`).
        """
        plain, _ = without_wrappers(checkpoint.tensors)
        names = {raw: peft_name(name) for raw, name in plain.items()}
        changed = sum(raw != name for raw, name in names.items())
        if changed:
            context.note("info", "fixed", f"{changed} keys renamed to those that PEFT looks for")
        return checkpoint.rename(names)


def peft_name(name: str) -> str:
    """The key under which PEFT saves and looks for an adapter's tensor, from any spelling of it."""
    while name.startswith(PEFT_PREFIX):
        name = name.removeprefix(PEFT_PREFIX)
    match = _ADAPTER_NAME.search(name)
    if match is not None and match["name"] not in _LEAVES:
        name = name[: match.end("kind")] + name[match.end() :]
    name = re.sub(r"\.modules_to_save\.[^.]+\.", ".", name)
    return PEFT_PREFIX + name


@dataclass(frozen=True)
class FixTies:
    """Store tied embeddings once where both copies are equal, and untie them, with consent, where they differ."""

    name: ClassVar[str] = "fix-ties"

    def __call__(self, checkpoint: Checkpoint, context: Context) -> Checkpoint:
        """The checkpoint with its ties as stored.

        Raises:
            Refused: the copies differ, without consent (`untie`).
        """
        stored = checkpoint.tensors
        dropped: dict[str, str] = {}
        apart: dict[str, str] = {}
        for tie in ties(stored, checkpoint.config):
            first, *rest = (n for n in tie.names if n in stored)
            for name in rest:
                if not context.equal(stored[first], stored[name]):
                    apart |= {name: first} if tie.older else {}
                elif tie.newer:
                    dropped[name] = f"equal to {first}, to which its class ties it"
        if dropped:
            context.note("info", "fixed", f"{fold(dropped)}: tied, equal, and stored once")
            kept = {n: t for n, t in stored.items() if n not in dropped}
            left = (*checkpoint.left, *(stored[n] for n in dropped))
            checkpoint = checkpoint.replace(tensors=kept, dropped={**checkpoint.dropped, **dropped}, left=left)
        apart = {name: first for name, first in apart.items() if is_output(name)}  # no config field unties the others
        if not apart:
            return checkpoint
        differ = "; ".join(f"{show(name)} differs from {show(first)}" for name, first in apart.items())
        what = f"{differ}, to which the config ties it: transformers 5 keeps both, transformers 4 drops {fold(apart)}"
        context.consent(Refused("untie", what, where=show(checkpoint.origin.asked)))
        context.note("changes-numbers", "untied", "tie_word_embeddings is false now: loaders use both tensors")
        config = untied(checkpoint.config)
        return checkpoint.replace(config=config, ties=(), tensors={**checkpoint.tensors, **_apart(checkpoint, config)})


def _apart(checkpoint: Checkpoint, config: Mapping[str, Any]) -> dict[str, LazyTensor]:
    """Tensors that the untied class asks for, and that were stored under the name of a tie alone (a head's bias)."""
    wanted = expected(config)
    if isinstance(wanted, Unknown):
        return {}
    found: dict[str, LazyTensor] = {}
    for tie in ties(checkpoint.tensors, checkpoint.config):
        first = next((n for n in tie.names if n in checkpoint.tensors), None)
        if first is not None:
            lacking = [n for n in tie.names if n in wanted.saved and n not in checkpoint.tensors]
            found |= dict.fromkeys(lacking, checkpoint.tensors[first])
    return found


@dataclass(frozen=True)
class SplitLora:
    """Merge, or split off, the LoRA layers that a trainer left in a full model (base_layer, lora_A, lora_B).

    Attributes:
        emit: `merged` or `adapter`.
        lora_alpha: of the training script; no tensor records it.
        base: the base model, for what the file lacks.
    """

    name: ClassVar[str] = "split-lora"

    emit: Literal["merged", "adapter"] = "merged"
    lora_alpha: float | None = None
    base: Input | None = None

    def __call__(self, checkpoint: Checkpoint, context: Context) -> Checkpoint:
        """The merged model, or the adapter.

        Raises:
            UsageError: lora_alpha is not known (`lora-alpha-unknown`).
            Refused: see `Gather`.
        """
        plain, _ = without_wrappers(checkpoint.tensors)
        context.note(
            "info", "fixed", f"LoRA layers in a full model: {fold([n for n in plain.values() if 'lora_' in n])}"
        )
        ties, copies = _ties_that_hold(checkpoint, context)
        names = {raw: n if PEFT_PREFIX in n else f"{PEFT_PREFIX}{n}" for raw, n in plain.items()}
        state = checkpoint.replace(ties=ties).rename(names)
        state = state.replace(origin=dataclasses.replace(checkpoint.origin, kind="training"), shards={}, trained=None)
        made = Gather(emit=self.emit, base=self.base, lora_alpha=self.lora_alpha)(state, context)
        renamed = {new for raw, new in names.items() if new != raw}
        left = tuple(state.tensors[n] for n in made.dropped if n in renamed and n in state.tensors)
        return made.replace(
            left=(*made.left, *left, *(checkpoint.tensors[n] for n in copies)), dropped={**made.dropped, **copies}
        )


def _ties_that_hold(checkpoint: Checkpoint, context: Context) -> tuple[tuple[tuple[str, ...], ...], dict[str, str]]:
    """Ties whose stored copies are equal, and these copies: what differs is two tensors, whatever the config says."""
    ties: list[tuple[str, ...]] = []
    copies: dict[str, str] = {}
    for group in checkpoint.ties:
        first, *rest = [n for n in group if n in checkpoint.tensors] or [""]
        if all(context.equal(checkpoint.tensors[first], checkpoint.tensors[n]) for n in rest):
            ties.append(group)
            copies |= dict.fromkeys(rest, f"equal to {first}, to which the config ties it")
    return tuple(ties), copies
