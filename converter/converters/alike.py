"""Whether models are points of one space: the same names, shapes, dtypes, ties, config and tokenizer."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from converter.core.checkpoint import MODEL, Checkpoint, SideFile
from converter.core.context import Context
from converter.core.files.opening import open_input
from converter.core.side_files import is_tokenizer_file
from converter.core.tensors.nodes import LazyTensor
from converter.diagnostic import Command, as_argument
from converter.errors import Refused
from converter.text import fold, show

SAYS_NOTHING = frozenset({"_name_or_path", "transformers_version", "_commit_hash"})
"""Keys of config.json that say where a model comes from, and not what it is."""


def expect_plain(model: Checkpoint) -> None:
    """Refuse what holds no model whose numbers can be added.

    Raises:
        Refused: no model (`models-differ`), or a quantised one (`base-quantised`).
    """
    asked = model.origin.asked
    if model.origin.kind != MODEL:
        step = Command("gather" if model.origin.kind != "adapter" else "merge-lora", (as_argument(asked), "OUT"))
        raise Refused("models-differ", f"it holds no model but {_kind(model)}", where=show(asked), next=step)
    narrow = [n for n, t in model.tensors.items() if t.info.dtype.is_float and t.info.dtype.bits < 16]
    if narrow or model.config.get("quantization_config"):
        what = f"the model is quantised ({fold(narrow) or 'quantization_config'}); its numbers can't be added"
        raise Refused("base-quantised", what, where=show(asked))


def _kind(model: Checkpoint) -> str:
    return "an adapter" if model.origin.kind == "adapter" else "a trainer's state"


def expect_alike(first: Checkpoint, other: Checkpoint) -> None:
    """Refuse a model of which some tensor, config entry or tokenizer file is not the first one's.

    Raises:
        Refused: they differ in more than values (`models-differ`).
    """
    for words, ours, theirs in (("", first.tensors, other.tensors), *_files_beside(first, other)):
        if alone := sorted(set(ours) ^ set(theirs)):
            raise differ(first, other, f"tensors{words} are in one of them only: {fold(alone)}")
        if changed := [n for n in ours if ours[n].info != theirs[n].info]:
            name = changed[0]
            facts = f"{_said(ours[name])} and {_said(theirs[name])}"
            raise differ(first, other, f"tensors{words} have other shapes or dtypes: {fold(changed)}: {facts}")
    if {*map(frozenset, first.ties)} != {*map(frozenset, other.ties)}:
        raise differ(first, other, "they tie other tensors to each other")
    if keys := other_keys(first.config, other.config):
        raise differ(first, other, f"config.json says otherwise: {', '.join(map(show, keys))}")
    names = {n for n in (*first.side_files, *other.side_files) if is_tokenizer_file(n)}
    if files := sorted(n for n in names if _content(first.side_files.get(n)) != _content(other.side_files.get(n))):
        raise differ(first, other, f"their tokenizers differ: {', '.join(map(show, files))}")


def _files_beside(
    first: Checkpoint, other: Checkpoint
) -> list[tuple[str, Mapping[str, LazyTensor], Mapping[str, LazyTensor]]]:
    names = sorted({*first.beside, *other.beside})
    return [(f" of {show(name)}", first.beside.get(name, {}), other.beside.get(name, {})) for name in names]


def _said(tensor: LazyTensor) -> str:
    return f"{tensor.info.dtype.value} {list(tensor.info.shape)}"


def other_keys(ours: Mapping[str, Any], theirs: Mapping[str, Any], but: Collection[str] = SAYS_NOTHING) -> list[str]:
    """Keys of two configs whose values differ, but for those that are left out."""
    keys = sorted({*ours, *theirs}.difference(but))
    missing = object()
    return [k for k in keys if ours.get(k, missing) != theirs.get(k, missing)]


def _content(file: SideFile | None) -> bytes | None:
    if file is None or file.source is None:
        return None if file is None else file.content
    with open(open_input(Path(file.source)), "rb") as opened:
        return opened.read()


def differ(first: Checkpoint, other: Checkpoint, what: str) -> Refused:
    """The refusal of two models that are not points of one space."""
    asked = (first.origin.asked, other.origin.asked)
    step = Command("diff", tuple(map(as_argument, asked)))
    return Refused("models-differ", f"{' and '.join(map(show, asked))}: {what}", where=show(asked[1]), next=step)


def equal_copies(first: Checkpoint, others: Sequence[Checkpoint], context: Context) -> list[LazyTensor]:
    """Tensors that are no floats have no mean: those of the others, where all are equal."""
    copies: list[LazyTensor] = []
    for other in others:
        pairs = [(n, t, other.tensors[n]) for n, t in first.tensors.items()]
        pairs += [(n, t, other.beside[file][n]) for file, held in first.beside.items() for n, t in held.items()]
        for name, ours, theirs in pairs:
            if ours.info.dtype.is_float:
                continue
            if not context.equal(ours, theirs):
                raise differ(first, other, f"{show(name)} is {ours.info.dtype.value}, has no mean, and differs")
            copies.append(theirs)
    return copies
