"""A trainer's state as `gather` would write it: planned in memory, compared with what a load asks for, not written."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from converter.core.checkpoint import ADAPTER, Checkpoint
from converter.core.context import Context
from converter.core.files.names import ADAPTER_CONFIG, MODEL_CONFIG
from converter.core.tensors.nodes import Cast, Filled, LazyTensor
from converter.diagnostic import Command, Steps
from converter.errors import ConvertError, Refused, UsageError
from converter.examine.diagnoses.case import Case
from converter.examine.diagnoses.values import ODD_VALUES
from converter.sources.finding import sources
from converter.sources.opening import open_recorded_base
from converter.sources.survey import Fault, StoredTensor, Survey

_NOT_OF_THE_RUN: Mapping[str, str] = {
    "config-missing": "there is no config.json beside or above the shards",
    "base-needed": "the base model is not at hand",
    "base-not-found": "the base model is not at hand",
    "base-unknown": "the base model is not known",
    "lora-alpha-unknown": "no config records lora_alpha",
    "several-parts": "it holds several models",
    "several-checkpoints": "it holds several checkpoints",
    "read-computed": "what decides is computed",
}
"""Refusals of `gather` that an option answers: nothing is wrong with the shards."""

_NEEDS_BASE = frozenset({"base-needed", "config-missing", "head-base-lost"})


@dataclass(frozen=True)
class Gathered:
    """What would be written.

    Attributes:
        checkpoint: the model or the adapter; None where `gather` refuses.
        faults: what it refuses, and what its loader would miss, pass over or stop at.
        why: why nothing was compared, in words; empty where it was.
    """

    checkpoint: Checkpoint | None = None
    faults: tuple[Fault, ...] = ()
    why: str = ""


@dataclass
class _Collecting(Context):
    """Goes on after what the user could consent to, and keeps it."""

    refused: list[Refused] = field(default_factory=list)

    def consent(self, error: Refused) -> None:
        """Keep the refusal."""
        self.refused.append(error)


def gathered_of(case: Case) -> Gathered:
    """What `gather` would make of a trainer's state."""
    return case.once("gathered", _gathered)


def _gathered(case: Case) -> Gathered:
    if case.source is None or case.survey.error() is not None or not case.shapes:
        return Gathered(why="its files are not whole")
    if all(isinstance(e.tensor, Filled) for e in case.survey.entries.values()):
        return Gathered(why="`gather`, or doctor with --deep, does that")
    # Both import what merges adapters, which a model's examination needs nothing of.
    from converter.examine.gate import expect_adapter_fits, expect_consistent, expect_whole

    context = _Collecting()
    try:
        opened = sources()[case.source].open(case.root, asked=case.asked)
        made = _made(opened, context)
        opened_too = [opened]
        expect_whole(made, context)
        expect_consistent(made, opened_too, context)
        expect_adapter_fits(made, opened_too, context)
    except ConvertError as error:
        return _stopped(error, context)
    return Gathered(made, tuple(map(_fault, context.refused)), _unknown(made, context))


def _made(opened: Checkpoint, context: Context) -> Checkpoint:
    """The converter's result; where only a base is missing, with the one that the run records."""
    from converter.converters.gather.gather import Gather

    try:
        return Gather()(opened, context)
    except ConvertError as error:
        if error.code not in _NEEDS_BASE:
            raise
        with suppress(ConvertError):
            return Gather(base=open_recorded_base(opened, keep_code=False))(opened, context)
        raise


def _stopped(error: ConvertError, context: _Collecting) -> Gathered:
    why = _NOT_OF_THE_RUN.get(error.code)
    faults = tuple(map(_fault, context.refused))
    if why is not None or isinstance(error, UsageError):
        return Gathered(None, faults, why or error.what)
    refused = error if isinstance(error, Refused) else Refused(error.code, error.what, where=error.where)
    return Gathered(None, (*faults, _fault(refused)))


def _fault(error: Refused) -> Fault:
    """A refusal as a fault of the run, with a step that doctor has not taken already."""
    if isinstance(error.next, Command) and error.next.verb == "doctor":
        shown = Command("inspect", (*error.next.arguments[:1], "--tensors"))
        error.next = Steps("every tensor is listed by ", shown)
    return Fault.of(error)


def _unknown(made: Checkpoint, context: Context) -> str:
    """Why names and shapes were not compared, as the gate noted it."""
    codes = {"family-unknown", "adapter-not-compared"}
    return next((n.text for n in context.notes if n.code in codes), "")


def as_written(case: Case) -> Case | None:
    """The model or the adapter that `gather` would write, as a case of its own; None where it would refuse."""
    made = gathered_of(case).checkpoint
    if made is None:
        return None
    entries = {n: StoredTensor(_as_saved(t), str(case.root)) for n, t in made.tensors.items()}
    is_adapter = made.origin.kind == ADAPTER
    files: dict[str, Any] = {ADAPTER_CONFIG if is_adapter else MODEL_CONFIG: dict(made.config)}
    return replace(
        case,
        kind="adapter" if is_adapter else "model",
        survey=Survey(case.root, entries=entries),
        near=(),
        _json={ADAPTER_CONFIG: {}, MODEL_CONFIG: {}, **files},
        _memos={ODD_VALUES: {}},  # the state's own tensors are looked at
    )


def _as_saved(tensor: LazyTensor) -> LazyTensor:
    """A float without the rounding that the output has: of zeros, NaN and scales it says the same."""
    while isinstance(tensor, Cast) and tensor.source.info.dtype.is_float:
        tensor = tensor.source
    return tensor
