"""Names on disk for a model whose tensors have their names in memory: those that transformers' own save would write.

transformers defines the direction from disk to memory (see `memory_names`); saving runs it backwards. Here a name on
disk is only guessed by that, and then proved: applying the patterns as a load does must give the name in memory. What
can't be proved keeps its name, which loads as it is. Experts that a load stacks are taken apart again: slices of the
same bytes.

Source: `revert_weight_conversion`, `MergeModulelist` and `Concatenate` of
https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/core_model_loading.py
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from converter.core.checkpoint import Checkpoint
from converter.core.context import Context
from converter.core.tensors import nodes as tensors
from converter.core.tensors.nodes import LazyTensor
from converter.errors import Refused
from converter.families.implied import class_of
from converter.families.memory_names import Architecture, architecture
from converter.text import fold, show

_GROUP = re.compile(r"\((?!\?).+?\)")
_LOOK_AROUND = re.compile(r"\(\?[=!<].*?\)+(?=[^)]|$)")
_ALTERNATIVE = re.compile(r"(?:^|\|)\(\?P<g\d+>")
# Stacked along a new first dimension, and pairs laid end to end along the next: so in every entry of the table.
_STACKED = frozenset({"MergeModulelist", "MergeModulelist+Concatenate"})


@dataclass(frozen=True)
class MemoryForm:
    """Tensors that have their names in memory, by what transformers' own save would make of them.

    Attributes:
        renamed: names on disk by names in memory, each proved.
        apart: stacks of experts by name, with what each is made of by names on disk.
        unclear: tensors that a load changes under their own name: whether it has is not recorded.
        on_disk: how many tensors have a name on disk that differs from the one in memory.
    """

    renamed: Mapping[str, str]
    apart: Mapping[str, Mapping[str, LazyTensor]]
    unclear: tuple[str, ...]
    on_disk: int

    @property
    def twice(self) -> dict[str, list[str]]:
        """Names in memory whose names on disk several tensors would have."""
        made: dict[str, list[str]] = {}
        for name, disk in (*self.renamed.items(), *((n, d) for n, parts in self.apart.items() for d in parts)):
            made.setdefault(disk, []).append(name)
        return {d: names for d, names in made.items() if len(names) > 1}


def memory_form(tensors: Mapping[str, LazyTensor], config: Mapping[str, Any]) -> MemoryForm | None:
    """What of a model is named as in memory; None for a class that transformers does not have."""
    built = architecture(class_of(config), config)
    if built is None:
        return None
    apart = {n: parts for n, t in tensors.items() if (parts := taken_apart(n, t, built))}
    plain = [n for n in tensors if n not in apart]
    met: set[int] = set()
    loaded = {n: built.in_memory(n, met) for n in sorted(plain)}
    unclear = tuple(n for n in plain if loaded[n][0] == n and loaded[n][1] is not None)
    renamed = disk_names(plain, built)
    on_disk = sum(loaded[n][0] != n for n in plain if n not in renamed)
    return MemoryForm(renamed, apart, unclear, on_disk)


def with_disk_names(checkpoint: Checkpoint, context: Context) -> Checkpoint:
    """A gathered model with the names that its class has on disk; the same where memory and disk agree.

    Raises:
        Refused: transformers changes tensors of these names when it loads them, and nothing tells whether these are as
            before or as after (`layout-unknown`); a tensor is there in both forms with different values
            (`names-in-memory`).
    """
    form = memory_form(checkpoint.tensors, checkpoint.config)
    if form is None:
        return checkpoint
    if form.unclear:
        raise Refused(
            "layout-unknown",
            f"transformers changes {len(form.unclear)} tensors when it loads them, and keeps their names; whether they "
            f"are as on disk or as in memory is not recorded: {fold(form.unclear)}",
            where=show(checkpoint.origin.asked),
            next="load the run with its own trainer and save it with save_pretrained",
        )
    return _on_disk(checkpoint, form, context)


def _on_disk(checkpoint: Checkpoint, form: MemoryForm, context: Context) -> Checkpoint:
    """The same values under names on disk; what is there in both forms with equal values is kept once."""
    if form.renamed:
        first, name = next(iter(form.renamed.items()))
        text = f"{len(form.renamed)} tensors are named as transformers saves them: {first} is {name} on disk"
        context.note("info", "disk-names", text)
    if form.apart:
        count = sum(map(len, form.apart.values()))
        text = f"{len(form.apart)} stacks of experts are {count} tensors, as transformers saves them"
        context.note("info", "disk-names", text)
    if not form.renamed and not form.apart:
        return checkpoint
    kept = {n: t for n, t in checkpoint.tensors.items() if n not in form.renamed and n not in form.apart}
    dropped: dict[str, str] = {}
    found: dict[str, LazyTensor] = {}
    shards: dict[str, str] = {}
    for name, tensor in checkpoint.tensors.items():
        made = form.apart.get(name) or {form.renamed.get(name, name): tensor}
        again = 0
        for disk, part in made.items():
            other = found.get(disk, kept.get(disk))
            if other is not None and other is not part:
                if not context.equal(part, other):
                    raise _differ(name, disk, checkpoint)
                again += 1
                if again == len(made):
                    dropped[name] = f"the same as {fold(made)}"
                continue
            found[disk] = part
            if name in checkpoint.shards:
                shards[disk] = checkpoint.shards[name]
    if dropped:
        text = f"{len(dropped)} tensors were there in both forms, with equal values: kept once"
        context.note("info", "disk-names", text)
    names = {n: d for n, d in form.renamed.items() if n not in dropped}
    less = {n: t for n, t in checkpoint.tensors.items() if n not in dropped or n in form.apart}
    renamed = checkpoint.replace(tensors=less, dropped={**checkpoint.dropped, **dropped}).rename(names)
    left = (*checkpoint.left, *(checkpoint.tensors[n] for n in dropped))
    return renamed.replace(tensors=found, shards=shards, left=left)


def _differ(name: str, disk: str, checkpoint: Checkpoint) -> Refused:
    return Refused(
        "names-in-memory",
        f"{show(name)} and {show(disk)} are one tensor by their names in memory and on disk, and their values differ: "
        "two saves in one folder",
        where=show(checkpoint.origin.asked),
        next="take one save alone: move the files of the other out of the folder",
    )


def taken_apart(name: str, tensor: LazyTensor, built: Architecture) -> Mapping[str, LazyTensor]:
    """What a load stacked into the tensor of this name, by names on disk; empty where it is not a stack."""
    shape = tensor.info.shape
    for transform in built.own:
        if transform.kind != "convert" or transform.operations not in _STACKED or len(shape) != 3:
            continue
        sources = list(_sources(transform.pattern.pattern))
        target = transform.targets[0]
        if not name.endswith(target) or shape[1] % len(sources) or any(s.count(".*") != 1 for s in sources):
            continue
        rows = shape[1] // len(sources)
        found: dict[str, LazyTensor] = {}
        for expert in range(shape[0]):
            whole = tensors.reshape(tensors.narrow(tensor, 0, expert, 1), shape[1:])
            for index, source in enumerate(sources):
                made = name.removesuffix(target) + source.replace(".*", str(expert))
                found[_backwards(made, built)] = tensors.narrow(whole, 0, index * rows, rows)
        loaded = [built.in_memory(d) for d in found]
        if all(n == name and t is not None and t.operations == transform.operations for n, t in loaded):
            return found
    return {}


def _sources(pattern: str) -> Iterator[str]:
    """What the alternatives of a pattern match, `.*` where there is a number."""
    for alternative in _ALTERNATIVE.split(pattern)[1:]:
        yield _LOOK_AROUND.sub("", alternative.removesuffix(")")).replace(r"\.", ".")


def disk_names(names: Iterable[str], built: Architecture) -> dict[str, str]:
    """Names on disk that differ, by their names in memory, each proved by the patterns of a load."""
    memory = list(names)
    guessed = {n: _backwards(n, built) for n in memory}
    met: set[int] = set()
    loaded = {d: built.in_memory(d, met) for d in sorted(set(guessed.values()))}
    found = {n: d for n, d in guessed.items() if n != d and loaded[d] == (n, None)}
    return {n: d for n, d in found.items() if not _is_in_memory(d, built)}


def _is_in_memory(name: str, built: Architecture) -> bool:
    """True where a load makes this name of another: then undoing renames has no end, and tells no name on disk."""
    before = _backwards(name, built)
    return before != name and built.in_memory(before) == (name, None)


def _backwards(name: str, built: Architecture) -> str:
    """The name with every rename undone, the innermost sub-model's first."""
    for transform in reversed(built.own):
        if transform.kind != "rename" or transform.pattern.pattern.endswith("(.+))"):
            continue  # whether a whole prefix was there is not known; names load with and without it
        head = transform.head(name)
        undone = _undo(transform.pattern.pattern, transform.targets[0])
        if head is None or undone is None:
            continue
        pattern, template = undone
        rest = name[len(head) :]
        match = pattern.search(rest)
        if match is not None:
            first = match[1] if pattern.groups else ""
            name = head + rest.replace(match[0], template.replace(r"\1", first), 1)
    return name


def _undo(source: str, target: str) -> tuple[re.Pattern[str], str] | None:
    """A pattern for what a rename made, and what it was made from; None for patterns that do not tell."""
    inner = source.removeprefix("(?P<g0>").removesuffix(")")
    plain = _LOOK_AROUND.sub("", inner)
    start = plain.startswith("^")
    plain = plain.removeprefix("^")
    group = _GROUP.search(plain)
    if group is not None:
        plain = plain.replace(group[0], r"\1", 1)
    template = plain.replace(r"\.", ".")
    if re.search(r"[*+?|()\[\]^$]|\\(?!1)", template):
        return None
    made = re.escape(target.replace(r"\.", "."))
    if group is not None:
        made = made.replace(re.escape(r"\1"), group[0], 1)
    elif r"\1" in target:
        return None
    end = r"(?!\w)" if made[-1:].isalnum() else ""
    return re.compile(("^" if start else "") + made + end), template
