"""`choose-weights`: of several sets of weight files, the one that alone covers what config.json implies, once."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from converter.core.checkpoint import Checkpoint, WeightSet
from converter.core.context import Context
from converter.core.files.names import MODEL_INDEX, PICKLED_INDEX
from converter.core.tensors.nodes import LazyTensor
from converter.diagnostic import Again, Steps
from converter.errors import Refused, UsageError
from converter.families.coverage import Judged, judged
from converter.text import fold, show


@dataclass(frozen=True)
class ChooseWeights:
    """Go on with the set of weight files that is the model; the others are left where they are.

    Attributes:
        file: a file of the set to take, where several cover the model with different values.
    """

    name: ClassVar[str] = "choose-weights"

    file: str | None = None

    def __call__(self, checkpoint: Checkpoint, context: Context) -> Checkpoint:
        """The checkpoint with the tensors of one set.

        Raises:
            UsageError: several sets cover the model, with different values, or `file` is in none (`weight-sets`).
            Refused: no set does, or a tensor is in two files of it with different values (`weight-sets`).
        """
        sets = judged(checkpoint.sets, checkpoint.config)
        if not sets:
            return checkpoint
        if self.file is None and not sets[0].lacks and sets[0].empty:
            return checkpoint.replace(sets=())  # what is lost in it is filled, other files being one place to look
        chosen = self._named(sets, checkpoint) if self.file is not None else _alone(sets, checkpoint, context)
        if chosen is None:
            return checkpoint.replace(sets=())
        _note(chosen, sets, context)
        return _with(checkpoint, chosen, context)

    def _named(self, sets: Sequence[Judged], checkpoint: Checkpoint) -> Judged:
        named = [s for s in sets if self.file in s.set.files or self.file == s.set.name]
        whole = [s for s in named if not s.lacks]
        if whole:
            return whole[0]
        where = show(checkpoint.origin.asked)
        if named:
            raise Refused("weight-sets", f"this set is not the whole model. {named[0].words}", where=where)
        listed = ", ".join(show(s.set.name) for s in sets)
        raise UsageError("weight-sets", f"no set has a file {show(self.file)}", where=where, expected=listed)


def _alone(sets: Sequence[Judged], checkpoint: Checkpoint, context: Context) -> Judged | None:
    """The set that covers the model; of several with equal values that which loaders read; None leaves it to `fill`."""
    where = show(checkpoint.origin.asked)
    whole = [s for s in sets if s.covers]
    if not whole:
        if any(t.info.shape == (0,) for t in checkpoint.tensors.values()):
            return None  # the files that are there may be completed from elsewhere
        text = f"none of {len(sets)} sets of weight files has what config.json implies" if len(sets) > 1 else ""
        listed = "".join(f"\n    {s.words}" for s in sets)
        raise Refused(
            "weight-sets",
            text or "the weight files are not the model that config.json implies",
            where=where,
            got=f"each lacks something:{listed}" if len(sets) > 1 else listed.strip(),
            next="copy or download one of the sets again",
        )
    chosen, *others = whole
    differ = [s for s in others if _difference(chosen.set, s.set, context) is not None]
    if differ:
        names = [show(s.set.name) for s in (chosen, *differ)]
        first = _difference(chosen.set, differ[0].set, context)
        raise UsageError(
            "weight-sets",
            f"{len(names)} sets of weight files each have the whole model, with different values: {', '.join(names)}; "
            f"{show(first)} is one that differs",
            where=where,
            expected="one of them",
            next=Steps(
                Again(("--set", next(iter(chosen.set.files)))),
                *(f" or --set {show(next(iter(s.set.files)))}" for s in differ),
            ),
        )
    return chosen


def _difference(a: WeightSet, b: WeightSet, context: Context) -> str | None:
    """A tensor that differs; one that only one of them has counts as such, unless it is a tie's second name."""
    left, right = a.tensors, b.tensors
    for name, tensor in left.items():
        if name in right and tensor.info.numel and not context.equal(tensor, right[name]):
            return name
    return None


def _note(chosen: Judged, sets: Sequence[Judged], context: Context) -> None:
    if len(sets) == 1:
        if not chosen.set.twice:
            index = MODEL_INDEX
            if not all(f.endswith(".safetensors") for f in chosen.set.files):
                index = PICKLED_INDEX
            text = f"{index} is not believed: {show(chosen.set.name)} has all {chosen.total} tensors by its headers"
            context.note("info", "weight-sets", text)
        return
    words = f"{show(chosen.set.name)} is taken: {chosen.total} tensors, all that config.json implies"
    context.note("info", "weight-sets", words)
    for each in sets:
        if each is chosen:
            continue
        if not each.lacks:
            words = f"{show(each.set.name)} is left: " + ("the same values" if each.covers else each.words)
            context.note("info", "weight-sets", words)
            continue
        context.note("info", "weight-sets", f"left: {each.words}")
        other = _difference(chosen.set, each.set, context)
        if other is not None:
            text = f"{show(each.set.name)} is of another save than what is taken: {show(other)} has other values in it"
            context.note("changes-numbers", "other-save", text)


def _with(checkpoint: Checkpoint, chosen: Judged, context: Context) -> Checkpoint:
    """The checkpoint of the chosen set; every tensor of the others is accounted for."""
    files, kept = chosen.set.files, dict(chosen.set.tensors)
    dropped: dict[str, str] = {}
    for name, homes in chosen.set.twice.items():
        first, *rest = homes
        for file in rest:
            if not context.equal(files[first][name], files[file][name]):
                raise Refused(
                    "weight-sets",
                    f"{show(name)} is in {show(first)} and in {show(file)}, with different values",
                    where=show(checkpoint.origin.asked),
                    next="move the file of the other save out of the folder",
                )
            dropped[f"{file}:{name}"] = f"equal to the one in {first}"
    if chosen.set.twice:
        text = f"{fold(chosen.set.twice)} in several files, with equal values: kept once"
        context.note("info", "weight-sets", text)
    for name, first_name in _shared(checkpoint, kept):
        dropped[name] = f"shares its memory with {first_name}"
        del kept[name]
    left = [s for s in checkpoint.sets if s is not chosen.set]
    every = {f: ts for s in left for f, ts in s.files.items()}
    spare = {f: ts for f, ts in checkpoint.beside.items() if f in every or f in files}
    aside = "of a set of weight files that was not chosen"
    for file, tensors in spare.items():
        again = "of the chosen set" if file in files else aside
        dropped |= {f"{file}:{n}": again for n in tensors}
    dropped |= {n: aside for n, t in checkpoint.tensors.items() if kept.get(n) != t}
    is_plain = all(f.endswith(".safetensors") for f in files)
    stored_in = {n: next(f for f, ts in files.items() if n in ts) for n in kept}
    return checkpoint.replace(
        tensors=kept,
        shards=stored_in if is_plain else {},
        beside={f: ts for f, ts in checkpoint.beside.items() if f not in spare},
        dropped={**checkpoint.dropped, **dropped},
        origin=dataclasses.replace(checkpoint.origin, stored_format="safetensors" if is_plain else "torch"),
        sets=(),
    )


def _shared(checkpoint: Checkpoint, kept: dict[str, LazyTensor]) -> Iterator[tuple[str, str]]:
    """Tied names that a pickled file stores as one tensor: safetensors keeps the first."""
    for group in checkpoint.ties:
        first, *rest = [n for n in group if n in kept] or [""]
        yield from [(n, first) for n in rest if kept[n] == kept[first]]
