"""Which dialect a checkpoint is in, inferred from names, files and config; and why, in words."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

from converter.converters.heads.model import resolve
from converter.converters.heads.plain import linear_head, plain_head
from converter.core.checkpoint import Checkpoint
from converter.core.files.names import MODEL_PICKLED
from converter.core.tensors.nodes import LazyTensor
from converter.diagnostic import Again
from converter.dialects.known import dialects
from converter.dialects.spec import Dialect, Marks
from converter.errors import Refused, UsageError
from converter.families.family import Family, family
from converter.families.words import CLASSIFIERS, OUTPUT_MODULES
from converter.text import fold, show

SPARE_FILE = MODEL_PICKLED
"""Where TRL saves the head beside an adapter; its names count as if they were among the weights."""

HEADLESS = "hf-causal"
_HEAD_WORDS = re.compile(
    r"(?:^|\.)(?:\w*(?:score|value|reward|v|rm|regression|cls)_?(?:head|layer)|" + "|".join(CLASSIFIERS) + r")\."
)


@dataclass(frozen=True)
class Detected:
    """A dialect and the signs that gave it away."""

    dialect: Dialect
    reason: str


def detect(checkpoint: Checkpoint) -> Detected | None:
    """The dialect of a checkpoint; None where it has no head.

    Raises:
        UsageError: the signs are of several dialects that read differently (`dialect-ambiguous`), or there is a head
            that none has (`dialect-unknown`).
    """
    found = sorted(_candidates(checkpoint), key=lambda each: (-each[0], each[1].name))
    if not found:
        stem = plain_head(checkpoint)
        if stem is not None and not is_encoders_own(checkpoint):
            shape = list(checkpoint.tensors[f"{stem}.weight"].info.shape)
            return Detected(linear_head(stem), f"{show(stem)}.weight {shape} is all that the backbone has beside it")
        _refuse_unknown(checkpoint)
        return None
    best = [each for each in found if each[0] == found[0][0]]
    kind = family(checkpoint.config)
    readings = {_reading(dialect, kind, checkpoint): dialect for _, dialect, _ in best}
    if len(readings) > 1:
        listed = "; ".join(f"{d.name} ({', '.join(why)})" for _, d, why in best)
        raise UsageError(
            "dialect-ambiguous",
            f"this can be read as {len(readings)} dialects, with different results",
            where=show(checkpoint.origin.asked),
            expected=" or ".join(f"--from {d.name}" for d in readings.values()),
            got=listed,
        )
    _, dialect, signs = best[0]
    return Detected(dialect, ", ".join(signs))


def _candidates(checkpoint: Checkpoint) -> Iterator[tuple[int, Dialect, list[str]]]:
    """Dialects whose signs are there: how many, and which, of the marks that fit best."""
    names = _names(checkpoint)
    for dialect in dialects().values():
        fitting = [signs for marks in dialect.marks if (signs := _signs(marks, names, checkpoint)) is not None]
        if fitting:
            best = max(fitting, key=len)
            yield len(best), dialect, best


def _names(checkpoint: Checkpoint) -> dict[str, LazyTensor]:
    return {**checkpoint.beside.get(SPARE_FILE, {}), **checkpoint.tensors}


def _signs(marks: Marks, names: Mapping[str, LazyTensor], checkpoint: Checkpoint) -> list[str] | None:
    """The signs, in words, or None where one is missing."""
    stem = str(checkpoint.config.get("value_head_prefix"))
    needed, barred = ([n.replace("{value_head_prefix}", stem) for n in each] for each in (marks.tensors, marks.without))
    if any(n not in names for n in needed) or any(n in names for n in barred):
        return None
    signs = [f"{show(n)} {list(names[n].info.shape)}" for n in needed]
    if marks.rows is not None and names[needed[0]].info.shape[:1] != (marks.rows,):
        return None
    if marks.backbone is not None:
        if not any(n.startswith(marks.backbone) for n in names):
            return None
        signs.append(f"`{marks.backbone}` before the backbone")
    if marks.beside:
        file = next((f for f in marks.beside if f in checkpoint.beside), None)
        if file is None:
            return None
        signs.append(f"{file} beside the weights")
    if marks.classes:
        listed = checkpoint.config.get("architectures")
        first = str(listed[0]) if isinstance(listed, list) and listed else ""
        if not first.endswith(marks.classes):
            return None
        signs.append(f"architectures {show(first)}")
    for key, value in marks.config:
        if key not in checkpoint.config or (value is not None and checkpoint.config[key] != value):
            return None
        signs.append(f"{key} in config.json")
    return signs


def _reading(dialect: Dialect, kind: Family, checkpoint: Checkpoint) -> tuple[object, ...]:
    """What reading by a dialect depends on; equal for dialects whose files are the same."""
    try:
        names = resolve(dialect.backbone, kind, checkpoint.config), resolve(dialect.head.stem, kind, checkpoint.config)
    except Refused:
        names = dialect.backbone, dialect.head.stem
    has_normaliser = "mean" in checkpoint.config or any(n.startswith("normalizer.") for n in checkpoint.tensors)
    return (
        *names,
        dialect.head.kind,
        dialect.head.file,
        bool(dialect.refused),
        dialect.own_backbone,
        dialect.normaliser if has_normaliser else "none",
    )


def _refuse_unknown(checkpoint: Checkpoint) -> None:
    heads = head_like(_names(checkpoint))
    if heads and is_encoders_own(checkpoint):
        first = show(checkpoint.config["architectures"][0])
        what = f"{first} scores with other layers than one linear on one token: no decoder's head says the same"
        raise Refused("head-not-linear", what, where=show(checkpoint.origin.asked))
    if heads:
        raise UsageError(
            "dialect-unknown",
            f"there is a head that no known dialect has here: {fold(heads)}",
            where=show(checkpoint.origin.asked),
            expected="--head NAME, for one of them that is a linear layer, or --from "
            + ", ".join(n for n, d in dialects().items() if not d.refused and n != HEADLESS),
            next=Again(("--head", _layer(heads[0]))),
        )


def _layer(name: str) -> str:
    """The layer that a tensor is of."""
    return name.rpartition(".")[0]


def is_encoders_own(checkpoint: Checkpoint) -> bool:
    """True for a class of transformers that pools by more than one linear layer on one token."""
    listed = checkpoint.config.get("architectures")
    first = str(listed[0]) if isinstance(listed, list) and listed else ""
    return first.endswith("ForSequenceClassification") and family(checkpoint.config).is_encoder


def head_like(names: Iterable[str]) -> list[str]:
    """Names that look like those of a head."""
    return [n for n in names if _is_head_like(n)]


@lru_cache(maxsize=1 << 15)
def _is_head_like(name: str) -> bool:
    return _HEAD_WORDS.search(name) is not None and not name.startswith(OUTPUT_MODULES)
