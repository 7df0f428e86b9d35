"""`average`: the weighted mean of models of one architecture, summed in fp64 and rounded once.

What RLHF averages: reward models of several seeds, the last checkpoints of a run, a policy and its start. Models that
differ in names, shapes, dtypes, config or tokenizer are no points of one space, and their mean is not a model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from converter.converters.alike import equal_copies, expect_alike, expect_plain
from converter.core.checkpoint import Checkpoint, Input
from converter.core.context import Context
from converter.core.tensors import nodes as tensors
from converter.core.tensors.kernel_specs import WEIGHTED_SUM
from converter.core.tensors.nodes import LazyTensor
from converter.errors import UsageError


@dataclass(frozen=True)
class Average:
    """The weighted mean of the checkpoint that flows through and others like it.

    Attributes:
        others: opened models.
        weights: one number for each model, the first one's included; divided by their sum. Empty: the plain mean.
    """

    name: ClassVar[str] = "average"

    others: tuple[Input, ...]
    weights: tuple[float, ...] = ()

    def __call__(self, checkpoint: Checkpoint, context: Context) -> Checkpoint:
        """The mean, with the first model's config and side files.

        Raises:
            UsageError: a single model, or weights that do not go with the models (`usage`).
            Refused: the models differ in more than values (`models-differ`), or are quantised (`base-quantised`).
        """
        models = (checkpoint, *self.others)
        shares = _shares(self.weights, len(models))
        for other in models:
            expect_plain(other)
        for other in self.others:
            expect_alike(checkpoint, other)
        mean = {n: _mean([m.tensors[n] for m in models], shares) for n in checkpoint.tensors}
        beside = {
            file: {n: _mean([m.beside[file][n] for m in models], shares) for n in held}
            for file, held in checkpoint.beside.items()
        }
        return checkpoint.replace(
            tensors=mean, beside=beside, left=(*checkpoint.left, *equal_copies(checkpoint, self.others, context))
        )


def _shares(weights: Sequence[float], count: int) -> tuple[float, ...]:
    """The weights divided by their sum."""
    if count < 2:
        raise UsageError("usage", "average needs two models or more")
    given = tuple(weights) or (1.0,) * count
    if len(given) != count:
        raise UsageError("usage", "give one weight for each model, in order", expected=str(count), got=str(len(given)))
    total = math.fsum(given)
    if not all(map(math.isfinite, given)) or not math.isfinite(total) or abs(total) < 1e-9:
        raise UsageError("usage", "the weights have no sum to divide by", got=", ".join(map(str, given)))
    return tuple(weight / total for weight in given)


def _mean(found: Sequence[LazyTensor], shares: tuple[float, ...]) -> LazyTensor:
    first = found[0]
    if not first.info.dtype.is_float:
        return first
    return tensors.apply(WEIGHTED_SUM, found, {"shares": shares, "out": first.info.dtype.value})
