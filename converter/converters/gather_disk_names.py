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

from converter import tensors
from converter.checkpoint import Checkpoint
from converter.context import Context
from converter.converters.memory_names import Architecture, architecture
from converter.errors import Refused, fold, show
from converter.tensors import LazyTensor

_GROUP = re.compile(r"\((?!\?).+?\)")
_LOOK_AROUND = re.compile(r"\(\?[=!<].*?\)+(?=[^)]|$)")
_ALTERNATIVE = re.compile(r"(?:^|\|)\(\?P<g\d+>")
# Stacked along a new first dimension, and pairs laid end to end along the next: so in every entry of the table.
_STACKED = frozenset({"MergeModulelist", "MergeModulelist+Concatenate"})


def with_disk_names(checkpoint: Checkpoint, context: Context) -> Checkpoint:
    """A gathered model with the names that its class has on disk; the same where memory and disk agree.

    Raises:
        Refused: transformers changes tensors of these names when it loads them, and nothing tells whether these are as
            before or as after (`layout-unknown`).
    """
    listed = checkpoint.config.get("architectures")
    built = architecture(listed[0] if isinstance(listed, list) and listed else None, checkpoint.config)
    if built is None:
        return checkpoint
    apart = {n: parts for n, t in checkpoint.tensors.items() if (parts := taken_apart(n, t, built))}
    plain = [n for n in checkpoint.tensors if n not in apart]
    changed = [n for n in plain if (loaded := built.in_memory(n))[0] == n and loaded[1] is not None]
    if changed:
        raise Refused(
            "layout-unknown",
            f"transformers changes {len(changed)} tensors when it loads them, and keeps their names; whether they are "
            f"as on disk or as in memory is not recorded: {fold(changed)}",
            where=show(checkpoint.origin.asked),
            next="load the run with its own trainer and save it with save_pretrained",
        )
    new = disk_names(plain, built)
    if new:
        first, name = next(iter(new.items()))
        text = f"{len(new)} tensors are named as transformers saves them: {first} is {name} on disk"
        context.note("info", "disk-names", text)
    if not apart:
        return checkpoint.rename(new)
    count = sum(map(len, apart.values()))
    context.note(
        "info", "disk-names", f"{len(apart)} stacks of experts are {count} tensors, as transformers saves them"
    )
    renamed = checkpoint.rename(new)
    found: dict[str, LazyTensor] = {}
    for name, tensor in renamed.tensors.items():
        found |= apart.get(name) or {name: tensor}
    return renamed.replace(tensors=found)


def taken_apart(name: str, tensor: LazyTensor, built: Architecture) -> Mapping[str, LazyTensor]:
    """What a load stacked into the tensor of this name, by names on disk; empty where it is no stack."""
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
    kept = set(memory) - set(found)
    return {n: d for n, d in found.items() if d not in kept}


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
