"""A checkpoint by what its tensors mean: one set of names for every trainer's layout, so that two can be compared.

Wrappers are taken off, a trainer's state is gathered, a head of any dialect is called `head`, names in memory become
those on disk, PEFT's keys get PEFT's spelling. What can't be read so keeps its names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from converter.converters.fix.names import peft_name
from converter.converters.gather.gather import Gather
from converter.converters.gather.peft_names import without_wrappers
from converter.converters.heads.detect import detect
from converter.converters.heads.model import Head, Linear
from converter.converters.heads.read import read
from converter.core.checkpoint import Checkpoint, SideFile
from converter.core.context import Context
from converter.core.files.opening import Identity
from converter.core.tensors.nodes import LazyTensor
from converter.errors import ConvertError, UsageError
from converter.families.disk_names import with_disk_names
from converter.families.ties import find_ties
from converter.text import show

HEAD = "head"
_MODULES = frozenset(
    {"target_modules", "modules_to_save", "exclude_modules", "layers_to_transform", "target_parameters"}
)
"""Lists of an adapter's config whose order means nothing; PEFT keeps them as sets."""


@dataclass(frozen=True)
class Comparable:
    """One side of a comparison.

    Attributes:
        tensors: by the names that they are paired under.
        tied: names that are stored on this side only under another name, with that tensor.
        said: how the names came about, in words.
    """

    kind: str
    tensors: Mapping[str, LazyTensor]
    config: Mapping[str, Any]
    side_files: Mapping[str, SideFile]
    inputs: Mapping[str, Identity]
    tied: Mapping[str, LazyTensor] = field(default_factory=dict)
    said: tuple[str, ...] = ()


def as_stored(checkpoint: Checkpoint) -> Comparable:
    """The tensors by their own names; those of a file beside by the file's name too."""
    tensors = dict(checkpoint.tensors)
    for file, inside in checkpoint.beside.items():
        tensors |= {f"{file}:{name}": tensor for name, tensor in inside.items()}
    return Comparable(
        checkpoint.origin.kind,
        tensors,
        _config(checkpoint),
        checkpoint.side_files,
        checkpoint.inputs,
        _tied(checkpoint.tensors, checkpoint.config),
    )


def by_meaning(checkpoint: Checkpoint) -> Comparable:
    """The tensors by names that do not depend on the trainer."""
    context = Context(frozenset({"head-reshaped"}))
    made, said = _gathered(checkpoint, context)
    if made.origin.kind == "adapter":
        return _adapter(made, said)
    if made.origin.kind == "training":
        return replace(as_stored(made), said=said)
    made, more = _plain(made, context)
    said += more
    head: dict[str, LazyTensor] = {}
    try:
        found = detect(made)
        if found is not None and found.dialect.head.kind not in ("none", "lm-row"):
            reading = read(made, found.dialect, context)
            head, made = dict(_head(reading.head, context)), reading.checkpoint
            said += (f"as {found.dialect.name}: {found.reason}",)
    except ConvertError:
        head = {}
    stored = as_stored(made)
    return replace(stored, tensors={**stored.tensors, **head}, said=said)


def _gathered(checkpoint: Checkpoint, context: Context) -> tuple[Checkpoint, tuple[str, ...]]:
    """A trainer's state as the model or the adapter that it holds; as it is where that can't be told."""
    if checkpoint.origin.kind != "training":
        return checkpoint, ()
    try:
        return Gather()(checkpoint, context), (f"gathered from {checkpoint.origin.stored_format}",)
    except UsageError as error:
        if error.code == "several-parts":
            raise
    except ConvertError:
        pass
    names, _ = without_wrappers(checkpoint.tensors)
    return checkpoint.rename(names), (f"as stored in {checkpoint.origin.stored_format}",)


def _plain(checkpoint: Checkpoint, context: Context) -> tuple[Checkpoint, tuple[str, ...]]:
    """A model's tensors without wrappers, under the names that transformers saves."""
    said: tuple[str, ...] = ()
    try:
        names, taken = without_wrappers(checkpoint.tensors)
        if taken:
            checkpoint = checkpoint.rename(names)
            said = (f"without {', '.join(f'`{show(t)}`' for t in taken)}",)
        named = with_disk_names(checkpoint, context)
    except ConvertError:
        return checkpoint, said
    if named.tensors.keys() != checkpoint.tensors.keys():
        said += ("names in memory as on disk",)
    return named, said


def _adapter(checkpoint: Checkpoint, said: tuple[str, ...]) -> Comparable:
    """An adapter under PEFT's own keys."""
    stored = as_stored(checkpoint)
    try:
        plain, _ = without_wrappers(checkpoint.tensors)
        names = {raw: peft_name(name) for raw, name in plain.items()}
        renamed = checkpoint.rename(names)
    except ConvertError:
        return replace(stored, said=said)
    if any(raw != name for raw, name in names.items()):
        said += ("keys as PEFT spells them",)
    return replace(as_stored(renamed), said=said)


def _head(head: Head | None, context: Context) -> Iterator[tuple[str, LazyTensor]]:
    """A head's layers; a bias of zero is none."""
    if head is None:
        return
    layers = {HEAD: head} if isinstance(head, Linear) else {f"{HEAD}.0": head.first, f"{HEAD}.2": head.second}
    for stem, layer in layers.items():
        yield f"{stem}.weight", layer.weight
        if layer.bias is not None and not context.is_zero(layer.bias):
            yield f"{stem}.bias", layer.bias


def _tied(tensors: Mapping[str, LazyTensor], config: Mapping[str, Any]) -> dict[str, LazyTensor]:
    """Names of ties that are not stored, with the tensor that stands for them."""
    found: dict[str, LazyTensor] = {}
    for group in find_ties(tensors, config):
        stored = next((n for n in group if n in tensors), None)
        if stored is not None:
            found |= {n: tensors[stored] for n in group if n not in tensors}
    return found


def _config(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """A config as it is compared: an adapter's without what is left at nothing, and its sets in one order."""
    if checkpoint.origin.kind != "adapter":
        return checkpoint.config
    kept = {k: v for k, v in checkpoint.config.items() if v not in (None, False, {}, []) or k == "bias"}
    return {k: sorted({str(x) for x in v}) if k in _MODULES and isinstance(v, list) else v for k, v in kept.items()}
