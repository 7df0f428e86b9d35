"""How an adapter's names become the base's names on disk: rules in order of how well founded they are.

First the names as they are (adapters of transformers 4, and families without another name), then the names that
transformers has in memory, then those with a wrapper's component put before or taken off. A rule is accepted only where
every name resolves under it.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from converter.diagnostic import Again, Steps
from converter.errors import Refused
from converter.families.memory_names import Architecture, MemoryNames, architectures, version
from converter.text import fold

AS_IN_BASE = "names as in the base"

_WHOLE = frozenset(("modules_to_save", "original_module"))

Find = Callable[[str], str | None]


@dataclass(frozen=True)
class NameRule:
    """How a tensor's name in the adapter becomes its name on disk.

    Attributes:
        words: the rule, to be printed.
        find: the name on disk, or None where the base has no such tensor.
        lacks: the backbone's prefix with its dot where the base's names lack it: the original gpt2 has `h.0`, not
            `transformer.h.0`.
    """

    words: str
    find: Find
    lacks: str = ""

    def tensor(self, name: str) -> str:
        """The name on disk; of a tensor that the base lacks, the one that it would have beside its module's weight."""
        found = self.find(name)
        if found is not None:
            return found
        module, _, leaf = name.rpartition(".")
        weight = self.find(f"{module}.weight")
        return name if weight is None else f"{weight.rpartition('.')[0]}.{leaf}"


class Biases:
    """Names on disk of biases that transformers calls otherwise in memory: VideoMAE's `q_bias` is `query.bias` there.

    A rule is found by weights, and a bias that it does not find may be one of these.
    """

    def __init__(self, config: Mapping[str, Any], stored: tuple[str, ...]) -> None:
        self._config, self._stored = config, frozenset(stored)
        self._memories: list[MemoryNames] | None = None

    def on_disk(self, name: str, rule: NameRule) -> str:
        """The name on disk of a tensor that is called `name` in the adapter."""
        plain = rule.tensor(name)
        if plain in self._stored or not name.endswith(".bias"):
            return plain
        if self._memories is None:
            self._memories = [MemoryNames.of(a, self._stored, ()) for a in _distinct(architectures(self._config, {}))]
        found = (memory.find(name) for memory in self._memories)
        return next((disk for disk in found if disk in self._stored), plain)


def find_rule(
    needed: Mapping[str, Collection[str]],
    stored: Collection[str],
    tied: Collection[str],
    built: Sequence[Architecture],
    *,
    adapter: str,
    base: str,
) -> NameRule:
    """The rule under which every needed tensor is in the base.

    Args:
        needed: tensor leaf names (`weight`, `bias`) by module.
        stored: tensors of the base.
        tied: names of the base that exist only through a tie.
        built: classes that the adapter may have been trained on.

    Raises:
        Refused: no rule resolves all (`adapter-unmatched`), several do and differ (`adapter-ambiguous`), or all would
            but for weights that are fused on loading (`adapter-fused`).
    """
    names = [f"{module}.{leaf}" for module, leaves in needed.items() for leaf in leaves]
    known = {*stored, *tied}

    @functools.cache
    def memories() -> list[MemoryNames]:
        return [MemoryNames.of(a, stored, tied) for a in _distinct(built)]

    best = names
    for stage in _stages(names, known, memories):
        accepted: dict[tuple[str | None, ...], NameRule] = {}
        for rule in stage:
            missing = [name for name in names if rule.find(name) is None]
            if not missing:
                accepted.setdefault(tuple(map(rule.find, names)), rule)
            elif len(missing) < len(best):
                best = missing
        if len(accepted) > 1:
            words = "; ".join(rule.words for rule in accepted.values())
            what = f"the adapter's names fit the base in several ways: {words}"
            raise Refused("adapter-ambiguous", what, where=adapter)
        if accepted:
            return next(iter(accepted.values()))
    raise _fused(best, known, memories(), adapter) or _unmatched(best, len(names), known, adapter, base)


def _distinct(built: Sequence[Architecture]) -> list[Architecture]:
    return list({(a.prefix, a.transforms): a for a in reversed(built)}.values())[::-1]


def _stages(
    names: Sequence[str], known: set[str], memories: Callable[[], Sequence[MemoryNames]]
) -> Iterator[Iterator[NameRule]]:
    """Rules by how well founded they are; within a stage all that fit must agree."""
    yield iter([_stored_rule(known)])
    yield (_memory_rule(memory, names) for memory in memories())
    yield (_older_rule(memory) for memory in memories())
    yield _wrapped(names, known, memories())


def _stored_rule(known: set[str]) -> NameRule:
    return NameRule(AS_IN_BASE, lambda name: name if name in known else None)


def _memory_rule(memory: MemoryNames, names: Sequence[str]) -> NameRule:
    prefix = f"{memory.architecture.prefix}."
    found = {name: memory.find(name) for name in names}
    lacks = prefix if any(memory.lacks_prefix(name) for name in names) else ""
    if all(disk is None or disk == name.removeprefix(prefix) for name, disk in found.items()):
        return NameRule(f"`{prefix}` taken off", memory.find, lacks)
    if all(disk is None or disk.removeprefix(prefix) == name for name, disk in found.items()):
        return NameRule(f"`{prefix}` put before", memory.find, lacks)
    return NameRule(f"{memory.architecture.name} of transformers {version()} in memory", memory.find, lacks)


def _older_rule(memory: MemoryNames) -> NameRule:
    """The adapter has names that were once on disk, and the base has later ones: both are taken to those in memory."""

    def find(name: str) -> str | None:
        new, converter = memory.architecture.in_memory(name)
        return memory.find(new) if converter is None else None

    return NameRule(f"earlier names of {memory.architecture.name}", find)


def _wrapped(names: Sequence[str], known: set[str], memories: Sequence[MemoryNames]) -> Iterator[NameRule]:
    """A wrapper's own component before the names (`pretrained_model.`), or a part of the model trained on its own."""
    for first in _firsts(names):
        bare = [name.removeprefix(first) for name in names]
        lacks = "" if memories else first
        for inner in (_stored_rule(known), *(_memory_rule(memory, bare) for memory in memories)):
            yield NameRule(_joined(f"`{first}` taken off", inner), _without(first, inner.find), inner.lacks or lacks)
    for first in _firsts(known):
        longer = [first + name for name in names]
        for inner in (_stored_rule(known), *(_memory_rule(memory, longer) for memory in memories)):
            yield NameRule(_joined(f"`{first}` put before", inner), _with(first, inner.find))


def _joined(words: str, inner: NameRule) -> str:
    return words if inner.words == AS_IN_BASE else f"{words}, then {inner.words}"


def _firsts(names: Collection[str]) -> dict[str, None]:
    return dict.fromkeys(name.split(".")[0] + "." for name in names if name.count(".") > 1)


def _without(first: str, find: Find) -> Find:
    return lambda name: find(name.removeprefix(first))


def _with(first: str, find: Find) -> Find:
    return lambda name: find(first + name)


def _fused(missing: Sequence[str], known: set[str], memories: Sequence[MemoryNames], adapter: str) -> Refused | None:
    """Why names do not resolve, where they are of weights that no single tensor on disk holds as the model has them."""
    bare = {name.rpartition(".")[0] for name in known if name.rpartition(".")[2] not in ("weight", "bias")}
    for memory in memories:
        made = {name: memory.operations(name.replace(".base_layer.", ".")) for name in missing}
        experts = [n for n in missing if "MergeModulelist" in (made[n] or "") or _is_bare_expert(n, bare)]
        if all(made[n] is not None or n in experts for n in missing):
            what = "fused expert weights" if experts else "weights that are rearranged on loading"
            return Refused(
                "adapter-fused",
                f"LoRA on {what} is not implemented: {fold(missing)}",
                where=adapter,
                expected="modules whose weight is one tensor on disk, such as those of attention",
                got=", ".join(dict.fromkeys(f"made by {o} on loading" for o in made.values() if o))
                or "bare parameters",
                next="merge it with PEFT itself: PeftModel.from_pretrained(...).merge_and_unload()",
            )
    return None


def _is_bare_expert(name: str, bare: Collection[str]) -> bool:
    module = name.replace(".base_layer.", ".").rpartition(".")[0]
    return module.endswith("experts") and module in bare


def _unmatched(missing: Sequence[str], total: int, known: set[str], adapter: str, base: str) -> Refused:
    inside = [n for n in missing if not _WHOLE.isdisjoint(n.split("."))]
    if inside:
        what = (
            f"{len(inside)} of its {total} modules have factors, and are inside of one that is saved whole "
            "(`all-linear` of earlier PEFT, over a classifier): which of the two the model ran can't be said"
        )
    elif len(missing) == total:
        what = "none of its modules is in the base: the adapter is for another architecture"
    else:
        what = f"{len(missing)} of its {total} modules match no weight of the base"
    return Refused(
        "adapter-unmatched",
        what,
        where=adapter,
        expected=f"every module in {base}, which has {fold(_sample(known))}",
        got=fold(missing),
        facts={"missing": len(missing)},
        next=Steps("name the base that it was trained on: ", Again(("--base", "DIR"))),
    )


def _sample(names: Collection[str]) -> list[str]:
    layered = sorted(n for n in names if re.search(r"\.\d+\.", n) and n.endswith("weight"))
    return layered or sorted(names)
