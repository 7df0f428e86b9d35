"""Mends of names and of stored ties: wrappers off, PEFT's own spelling, equal copies once, different ones untied."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import ClassVar, Literal

from converter.converters.gather.gather import Gather
from converter.converters.gather.peft_names import PEFT_PREFIX, without_wrappers
from converter.core.checkpoint import Checkpoint, Input
from converter.core.context import Context
from converter.errors import Refused
from converter.families.plain_names import plain_names
from converter.text import fold, show

_ADAPTER_NAME = re.compile(
    r"(?P<kind>\.lora_(?:A|B|embedding_A|embedding_B|magnitude_vector))\.(?P<name>[^.]+)(?=\.|$)"
)
_LEAVES = frozenset({"weight", "bias"})
_OUTPUTS = ("lm_head.weight", "embed_out.weight")


@dataclass(frozen=True)
class MendNames:
    """Take wrappers (module., _orig_mod., FSDP's) and prefixes that are not theirs off the names, to a fixpoint."""

    name: ClassVar[str] = "mend-names"

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
            context.note("info", "mended", "taken off the names: " + ", ".join(f"`{show(t)}`" for t in plain.taken))
        if dropped:
            context.note("info", "mended", f"there with a wrapper and without, with equal values: {fold(dropped)}")
        kept = {n: t for n, t in checkpoint.tensors.items() if n not in dropped}
        less = checkpoint.replace(tensors=kept, dropped={**checkpoint.dropped, **dropped})
        return less.rename({raw: n for raw, n in plain.names.items() if raw not in dropped})


@dataclass(frozen=True)
class MendAdapterNames:
    """Give an adapter's tensors the names that PEFT writes and looks for."""

    name: ClassVar[str] = "mend-adapter-names"

    def __call__(self, checkpoint: Checkpoint, context: Context) -> Checkpoint:
        """The adapter under PEFT's names.

        Raises:
            Refused: two tensors would get one name (`rename-collision`).
        """
        plain, _ = without_wrappers(checkpoint.tensors)
        names = {raw: peft_name(name) for raw, name in plain.items()}
        changed = sum(raw != name for raw, name in names.items())
        if changed:
            context.note("info", "mended", f"{changed} keys renamed to those that PEFT looks for")
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
class MendTies:
    """Store tied embeddings once where both copies are equal, and untie them, with consent, where they differ."""

    name: ClassVar[str] = "mend-ties"

    def __call__(self, checkpoint: Checkpoint, context: Context) -> Checkpoint:
        """The checkpoint with its ties as stored.

        Raises:
            Refused: the copies differ, without consent (`untie`).
        """
        checkpoint = _without_copies(checkpoint, context)
        stored = checkpoint.tensors
        output = next((n for n in _OUTPUTS if n in stored), None)
        inputs = [n for n in stored if n.endswith((".embed_tokens.weight", ".wte.weight", ".embed_in.weight"))]
        nested = checkpoint.config.get("text_config")
        config = nested if isinstance(nested, dict) and "tie_word_embeddings" in nested else checkpoint.config
        if output is None or len(inputs) != 1 or config.get("tie_word_embeddings") is not True:
            return checkpoint
        if context.equal(stored[inputs[0]], stored[output]):
            context.note("info", "mended", f"{show(output)} equals {show(inputs[0])} and is stored once")
            kept = {n: t for n, t in stored.items() if n != output}
            why = {output: f"equal to {inputs[0]}, to which the config ties it"}
            left = (*checkpoint.left, stored[output])
            return checkpoint.replace(tensors=kept, dropped={**checkpoint.dropped, **why}, left=left)
        what = f"{show(output)} differs from {show(inputs[0])}, to which the config ties it: loaders throw it away"
        context.consent(Refused("untie", what, where=show(checkpoint.origin.asked)))
        context.note("changes-numbers", "untied", "tie_word_embeddings is false now: loaders use both tensors")
        new = {**config, "tie_word_embeddings": False}
        whole = (
            new
            if config is checkpoint.config
            else {**checkpoint.config, "text_config": new, "tie_word_embeddings": False}
        )
        return checkpoint.replace(config=whole, ties=())


def _without_copies(checkpoint: Checkpoint, context: Context) -> Checkpoint:
    """Copies of one tensor that are no output embedding of a language model: T5's embeddings, BERT's decoder.

    Where they differ both stay: which of them a loader takes is its own affair, and no config field unties them.
    """
    dropped: dict[str, str] = {}
    for group in checkpoint.ties:
        first, *rest = [n for n in group if n in checkpoint.tensors] or [""]
        for name in [n for n in rest if len(group) > 2 or n not in _OUTPUTS]:
            if context.equal(checkpoint.tensors[first], checkpoint.tensors[name]):
                dropped[name] = f"equal to {first}, to which its class ties it"
    if not dropped:
        return checkpoint
    context.note("info", "mended", f"{fold(dropped)}: tied, equal, and stored once")
    kept = {n: t for n, t in checkpoint.tensors.items() if n not in dropped}
    left = (*checkpoint.left, *(checkpoint.tensors[n] for n in dropped))
    return checkpoint.replace(tensors=kept, dropped={**checkpoint.dropped, **dropped}, left=left)


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
            "info", "mended", f"LoRA layers in a full model: {fold([n for n in plain.values() if 'lora_' in n])}"
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
