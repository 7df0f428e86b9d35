"""`average`: the weighted mean of models of one architecture, summed in fp64 and rounded once.

What RLHF averages: reward models of several seeds, the last checkpoints of a run, a policy and its start. Models that
differ in names, shapes, dtypes, config or tokenizer are no points of one space, and their mean is not a model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from converter.core.checkpoint import MODEL, Checkpoint, Input, SideFile
from converter.core.context import Context
from converter.core.files.opening import open_input
from converter.core.side_files import is_tokenizer_file
from converter.core.tensors import nodes as tensors
from converter.core.tensors.kernel_specs import WEIGHTED_SUM
from converter.core.tensors.nodes import LazyTensor
from converter.diagnostic import Command, as_argument
from converter.errors import Refused, UsageError
from converter.text import fold, show

SAYS_NOTHING = frozenset({"_name_or_path", "transformers_version", "_commit_hash"})
"""Keys of config.json that say where a model comes from, and not what it is."""


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
            _expect_plain(other)
        for other in self.others:
            _expect_alike(checkpoint, other)
        mean = {n: _mean([m.tensors[n] for m in models], shares) for n in checkpoint.tensors}
        beside = {
            file: {n: _mean([m.beside[file][n] for m in models], shares) for n in held}
            for file, held in checkpoint.beside.items()
        }
        return checkpoint.replace(
            tensors=mean, beside=beside, left=(*checkpoint.left, *_equal_copies(checkpoint, self.others, context))
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


def _expect_plain(model: Checkpoint) -> None:
    asked = model.origin.asked
    if model.origin.kind != MODEL:
        step = Command("gather" if model.origin.kind != "adapter" else "merge-lora", (as_argument(asked), "OUT"))
        raise Refused("models-differ", f"it holds no model but {_kind(model)}", where=show(asked), next=step)
    narrow = [n for n, t in model.tensors.items() if t.info.dtype.is_float and t.info.dtype.bits < 16]
    if narrow or model.config.get("quantization_config"):
        what = f"the model is quantised ({fold(narrow) or 'quantization_config'}); its numbers can't be averaged"
        raise Refused("base-quantised", what, where=show(asked))


def _kind(model: Checkpoint) -> str:
    return "an adapter" if model.origin.kind == "adapter" else "a trainer's state"


def _expect_alike(first: Checkpoint, other: Checkpoint) -> None:
    """Refuse a model of which some tensor, config entry or tokenizer file is not the first one's."""
    for words, ours, theirs in (("", first.tensors, other.tensors), *_files_beside(first, other)):
        if alone := sorted(set(ours) ^ set(theirs)):
            raise _differ(first, other, f"tensors{words} are in one of them only: {fold(alone)}")
        if changed := [n for n in ours if ours[n].info != theirs[n].info]:
            name = changed[0]
            facts = f"{_said(ours[name])} and {_said(theirs[name])}"
            raise _differ(first, other, f"tensors{words} have other shapes or dtypes: {fold(changed)}: {facts}")
    if keys := _other_keys(first.config, other.config):
        raise _differ(first, other, f"config.json says otherwise: {', '.join(map(show, keys))}")
    names = {n for n in (*first.side_files, *other.side_files) if is_tokenizer_file(n)}
    if files := sorted(n for n in names if _content(first.side_files.get(n)) != _content(other.side_files.get(n))):
        raise _differ(first, other, f"their tokenizers differ: {', '.join(map(show, files))}")


def _files_beside(
    first: Checkpoint, other: Checkpoint
) -> list[tuple[str, Mapping[str, LazyTensor], Mapping[str, LazyTensor]]]:
    names = sorted({*first.beside, *other.beside})
    return [(f" of {show(name)}", first.beside.get(name, {}), other.beside.get(name, {})) for name in names]


def _said(tensor: LazyTensor) -> str:
    return f"{tensor.info.dtype.value} {list(tensor.info.shape)}"


def _other_keys(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    keys = sorted({*ours, *theirs} - SAYS_NOTHING)
    missing = object()
    return [k for k in keys if ours.get(k, missing) != theirs.get(k, missing)]


def _content(file: SideFile | None) -> bytes | None:
    if file is None or file.source is None:
        return None if file is None else file.content
    with open(open_input(Path(file.source)), "rb") as opened:
        return opened.read()


def _differ(first: Checkpoint, other: Checkpoint, what: str) -> Refused:
    asked = (first.origin.asked, other.origin.asked)
    step = Command("diff", tuple(map(as_argument, asked)))
    return Refused("models-differ", f"{' and '.join(map(show, asked))}: {what}", where=show(asked[1]), next=step)


def _equal_copies(first: Checkpoint, others: Sequence[Checkpoint], context: Context) -> list[LazyTensor]:
    """Tensors that are no floats have no mean: those of the others, where all are equal."""
    copies: list[LazyTensor] = []
    for other in others:
        pairs = [(n, t, other.tensors[n]) for n, t in first.tensors.items()]
        pairs += [(n, t, other.beside[file][n]) for file, held in first.beside.items() for n, t in held.items()]
        for name, ours, theirs in pairs:
            if ours.info.dtype.is_float:
                continue
            if not context.equal(ours, theirs):
                raise _differ(first, other, f"{show(name)} is {ours.info.dtype.value}, has no mean, and differs")
            copies.append(theirs)
    return copies
