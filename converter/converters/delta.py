"""`make-delta` and `apply-delta`: the difference of two models as a folder, and models with such differences added.

A difference (a "task vector") is kept in fp32 under the names of the model's own tensors; its folder has a
`delta_config.json` and no `config.json`, so that no loader takes it for a model. `delta_config.json` holds the base's
name and header digest, the tuned model's config and its ties.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from converter.converters.alike import SAYS_NOTHING, differ, equal_copies, expect_alike, expect_plain, other_keys
from converter.core.checkpoint import DELTA, Checkpoint, Input
from converter.core.context import Context
from converter.core.files.names import DELTA_STEM
from converter.core.tensors import nodes as tensors
from converter.core.tensors.dtypes import DType
from converter.core.tensors.kernel_specs import DIFFERENCE, WEIGHTED_SUM
from converter.core.tensors.nodes import LazyTensor
from converter.diagnostic import Command, as_argument
from converter.errors import Refused, UsageError
from converter.text import fold, show

FORMAT = 1
"""Of `delta_config.json`."""

_OF_NUMBERS = frozenset({"dtype", "torch_dtype"})
"""Keys of config.json that say what numbers are stored in: a difference goes over any."""


@dataclass(frozen=True)
class MakeDelta:
    """What training added to a base: the model that flows through, less another.

    Attributes:
        base: the model that training began with.
    """

    name: ClassVar[str] = "make-delta"
    compares_models: ClassVar[bool] = True

    base: Input

    def __call__(self, checkpoint: Checkpoint, context: Context) -> Checkpoint:
        """The differences of all tensors of floats, in fp32.

        Raises:
            Refused: the models differ in more than values (`models-differ`), or are quantised (`base-quantised`).
        """
        tuned, base = checkpoint, self.base
        for model in (tuned, base):
            expect_plain(model)
            if model.beside:
                what = f"weights lie beside the main files ({fold(model.beside)}), which a difference has no place for"
                raise Refused("models-differ", what, where=show(model.origin.asked))
        expect_alike(base, tuned)
        copies = equal_copies(base, (tuned,), context)
        made = {n: _difference(base.tensors[n], t) for n, t in tuned.tensors.items() if t.info.dtype.is_float}
        return tuned.replace(
            tensors=made,
            config=_described(base, tuned),
            origin=dataclasses.replace(tuned.origin, kind=DELTA),
            side_files={},
            ties=(),
            shards={n: f for n, f in tuned.shards.items() if n in made},
            stem=DELTA_STEM,
            left=(*tuned.left, *copies, *(t for t in base.tensors.values() if not t.info.dtype.is_float)),
        )


def _difference(base: LazyTensor, tuned: LazyTensor) -> LazyTensor:
    return tensors.apply(DIFFERENCE, (base, tuned), {"out": DType.F32.value})


def _described(base: Checkpoint, tuned: Checkpoint) -> dict[str, Any]:
    """What `delta_config.json` says; nothing of this machine."""
    made_of = {"name": base.origin.name, "revision": base.origin.revision, "header_digest": base.origin.header_digest}
    config = {k: v for k, v in tuned.config.items() if k not in SAYS_NOTHING}
    return {"format": FORMAT, "base": made_of, "config": config, "ties": sorted(map(sorted, tuned.ties))}


@dataclass(frozen=True)
class ApplyDelta:
    """The model that flows through, plus differences, each times a weight.

    Attributes:
        deltas: opened differences.
        weights: one number for each; empty: 1 for all.
    """

    name: ClassVar[str] = "apply-delta"

    deltas: tuple[Input, ...]
    weights: tuple[float, ...] = ()

    def __call__(self, checkpoint: Checkpoint, context: Context) -> Checkpoint:
        """The sums, in fp64, rounded once to the model's own dtypes; everything else is the model's.

        Raises:
            UsageError: not one weight for each difference, or one that is not finite (`usage`).
            Refused: a difference is of another model in more than values (`models-differ`), or is none (`not-a-delta`).
        """
        weights = self.weights or (1.0,) * len(self.deltas)
        if not self.deltas or len(weights) != len(self.deltas):
            expected, got = str(len(self.deltas) or "a difference"), str(len(weights))
            raise UsageError("usage", "give one weight for each difference, in order", expected=expected, got=got)
        if not all(map(math.isfinite, weights)):
            raise UsageError("usage", "a weight is not a number", got=", ".join(map(str, weights)))
        expect_plain(checkpoint)
        for delta in self.deltas:
            _expect_of(checkpoint, delta)
            _note_base(checkpoint, delta, context)
        shares = (1.0, *weights)
        return checkpoint.replace(tensors={n: _sum(t, n, self.deltas, shares) for n, t in checkpoint.tensors.items()})


def _sum(base: LazyTensor, name: str, deltas: tuple[Checkpoint, ...], shares: tuple[float, ...]) -> LazyTensor:
    if not base.info.dtype.is_float:
        return base
    inputs = [base, *(d.tensors[name] for d in deltas)]
    return tensors.apply(WEIGHTED_SUM, inputs, {"shares": shares, "out": base.info.dtype.value})


def _expect_of(model: Checkpoint, delta: Checkpoint) -> None:
    """Refuse a difference whose names, shapes, ties or config are not the model's."""
    asked = show(delta.origin.asked)
    if delta.origin.kind != DELTA:
        made = Command("make-delta", ("BASE", as_argument(delta.origin.asked), "OUT"))
        raise Refused("not-a-delta", "it is not a difference of two models", where=asked, next=made)
    floats = {n: t.info.shape for n, t in model.tensors.items() if t.info.dtype.is_float}
    shapes = {n: t.info.shape for n, t in delta.tensors.items()}
    if alone := sorted({*floats} ^ {*shapes}):
        raise differ(model, delta, f"tensors are in one of them only: {fold(alone)}")
    if changed := [n for n in floats if floats[n] != shapes[n]]:
        both = f"{list(floats[changed[0]])} and {list(shapes[changed[0]])}"
        raise differ(model, delta, f"tensors have other shapes: {fold(changed)}: {both}")
    if sorted(map(sorted, model.ties)) != sorted(map(sorted, _ties_of(delta))):
        raise differ(model, delta, "they tie other tensors to each other")
    config = delta.config.get("config")
    recorded: Mapping[str, Any] = config if isinstance(config, dict) else {}
    if keys := other_keys(model.config, recorded, SAYS_NOTHING | _OF_NUMBERS):
        raise differ(model, delta, f"the configs say otherwise: {', '.join(map(show, keys))}")


def _ties_of(delta: Checkpoint) -> list[list[str]]:
    found = delta.config.get("ties")
    groups = found if isinstance(found, list) else []
    return [[str(n) for n in group] for group in groups if isinstance(group, list)]


def _note_base(model: Checkpoint, delta: Checkpoint, context: Context) -> None:
    """Tell where a difference is added to another model than it was taken from, as task arithmetic does."""
    base = delta.config.get("base")
    if isinstance(base, dict) and base.get("header_digest") != model.origin.header_digest:
        text = f"{show(delta.origin.asked)} was taken from {show(base.get('name'))}, and is added to another model"
        context.note("info", "delta-other-base", text)
