"""A linear head under a name that a user's own class gave it: `reward_head`, `rm_head`, `value_head.summary`, any.

It is not recognised by its name. It is one where nothing else can be meant: the one layer outside of the backbone and
the output embedding, with as many columns as the model is wide, which the class of config.json does not have itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

from converter.core.checkpoint import Checkpoint
from converter.dialects.spec import Dialect, HeadSpec
from converter.errors import Refused
from converter.families.expected import Expected, Unknown, expected
from converter.families.family import family, label_count
from converter.families.implied import class_of
from converter.families.memory_names import class_names
from converter.families.words import OUTPUT_PREFIXES
from converter.text import fold, show

LINEAR = Dialect(
    "linear-head",
    "one linear layer of a user's own class",
    reward=None,
    critic=None,
    writable=False,
    evidence=(),
)
"""The dialect of such a folder, once its head is named."""

_MOST_ROWS = 1024
"""Rows beyond which a layer is a vocabulary's and not one of labels."""

_FEW_ROWS = 32
"""Rows up to which a layer is a head where config.json says no number of labels: projections have more."""

_TAIL = 3
"""Parts at a name's end that tell a module of a layer: `self_attn.k_proj.weight`."""


def linear_head(stem: str) -> Dialect:
    """The dialect of a folder whose head is the layer of this name."""
    spec = HeadSpec(stem, missing="random, or an error of the class that has it")
    return dataclasses.replace(LINEAR, reward=spec, critic=spec)


def plain_head(checkpoint: Checkpoint) -> str | None:
    """The name of the one layer that can only be a head; None where there is none, or more than one."""
    kind = family(checkpoint.config)
    if kind.prefix is None or kind.hidden is None:
        return None
    outside = [n for n in checkpoint.tensors if not n.startswith((kind.prefix, *OUTPUT_PREFIXES))]
    stems = {n.rpartition(".")[0] for n in outside}
    stem = next(iter(stems), "")
    if len(stems) != 1 or not stem or {n.rpartition(".")[2] for n in outside} - {"weight", "bias"}:
        return None
    if not _is_head(checkpoint, stem, kind.hidden):
        return None
    rows = checkpoint.tensors[f"{stem}.weight"].info.shape[0]
    if rows > min(_FEW_ROWS, kind.hidden - 1) and rows != label_count(checkpoint.config):
        return None
    wanted = expected(checkpoint.config)
    if isinstance(wanted, Unknown) and class_of(checkpoint.config) in class_names():
        return None  # it may be that class's own: whoever knows the class did not answer
    known = set() if isinstance(wanted, Unknown) else set(wanted.saved)
    is_of_class = isinstance(wanted, Expected) and not wanted.free and f"{stem}.weight" in known
    return None if is_of_class or _is_of_a_layer(stem, {*checkpoint.tensors, *known} - {*outside}) else stem


def named_head(checkpoint: Checkpoint, stem: str) -> Dialect:
    """The dialect with the head that the user names.

    Raises:
        Refused: no layer of that name and the model's width is there (`head-missing`, `head-shape`).
    """
    where, hidden = show(checkpoint.origin.asked), family(checkpoint.config).hidden
    weight = checkpoint.tensors.get(f"{stem}.weight")
    if weight is None:
        likely = [n.removesuffix(".weight") for n in checkpoint.tensors if _is_head(checkpoint, n[:-7], hidden)]
        what = f"no tensor is named {show(stem)}.weight"
        raise Refused("head-missing", what, where=where, expected=f"--head {fold(likely)}" if likely else None)
    if not _is_head(checkpoint, stem, hidden):
        what = f"{show(stem)}.weight is {list(weight.info.shape)}, and a head is [labels, {hidden}]"
        raise Refused("head-shape", what, where=where)
    return linear_head(stem)


def _is_of_a_layer(stem: str, names: Collection[str]) -> bool:
    """True for a copy of what the backbone's layers have, under a foreign prefix: a router is as small as a head."""
    tail = tuple(f"{stem}.weight".split(".")[-_TAIL:])
    return len(tail) == _TAIL and any(tuple(name.split(".")[-_TAIL:]) == tail for name in names)


def _is_head(checkpoint: Checkpoint, stem: str, hidden: int | None) -> bool:
    weight, bias = (checkpoint.tensors.get(f"{stem}.{leaf}") for leaf in ("weight", "bias"))
    if weight is None or len(weight.info.shape) != 2 or (hidden is not None and weight.info.shape[1] != hidden):
        return False
    rows = weight.info.shape[0]
    return 0 < rows <= _MOST_ROWS and (bias is None or bias.info.shape == (rows,))
