"""What transformers calls a checkpoint's tensors in memory, inferred from their names on disk: data, no transformers.

Since version 5 the modules of many families have other names than their checkpoints: LLaVA's
`language_model.model.layers` is `model.language_model.layers` in memory, and so it is in an adapter. transformers
defines the direction from disk to memory, by a list of patterns for each class and each of its sub-models.
`memory_names.json` holds these lists; here they are applied to the names of a base's tensors as transformers applies
them, and the result is inverted by looking it up. No pattern is ever run backwards.

Tensors that are also joined, cut or permuted on the way are known by name: `rearranged` has their views, and an
adapter on the rest is refused.

Source: `WeightTransform.rename_source_key`, `rename_source_key` and `get_model_conversion_mapping`,
https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/core_model_loading.py
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from converter.families.transforms import Change, Transform

_DATA = Path(__file__).with_name("memory_names.json")
_NAMED_GROUP = re.compile(r"\(\?P<g\d+>")
_NUMBER = re.compile(r"(?<=\.)(\d+)(?=\.)", re.ASCII)
_STAND_IN = "90909"
"""Of a number in a name, with two more digits that tell which."""
_ASKS_FOR_NUMBER = re.compile(r"(?<![A-Za-z_\\\d])\d|\\\d|\{")
"""Patterns that want one number, as many digits, or the same number twice."""
_GENERAL_TASKS = ("CAUSAL_LM", "IMAGE_TEXT", "SEQ_2_SEQ_LM", "base")


@functools.cache
def table() -> dict[str, Any]:
    """`memory_names.json`."""
    data: dict[str, Any] = json.loads(_DATA.read_text(encoding="utf-8"))
    return data


@functools.cache
def _classes() -> dict[str, tuple[str, str]]:
    """Model type and backbone prefix of each class."""
    return {
        name: (kind, prefix)
        for kind, prefixes in table()["families"].items()
        for prefix, names in prefixes.items()
        for name in names
    }


def class_names() -> frozenset[str]:
    """Every class that transformers has."""
    return frozenset(_classes())


def sorted_names(names: Iterable[str]) -> list[str]:
    """In the order in which a load goes through them."""
    return sorted(names, key=_natural)


def version() -> str:
    """The transformers release that the data was taken from."""
    return str(table()["transformers"])


@functools.cache
def _rules(identifier: str) -> tuple[Transform, ...] | None:
    rows = table()["rules"].get(identifier)
    return None if rows is None else tuple(_transform(row) for row in rows)


def _transform(row: list[Any]) -> Transform:
    kind, pattern, *rest = row
    how: dict[str, Any] = rest.pop() if isinstance(rest[-1], dict) else {}
    change = Change(how.get("dim", 0), tuple(how.get("permute", ())), how.get("count", ""))
    offset = rest.pop() if kind == "shift" else 0
    operations = rest.pop() if kind == "convert" else ""
    return Transform(kind, re.compile(pattern), tuple(rest), offset, operations, change=change)


@dataclass(frozen=True)
class Architecture:
    """A model class of transformers, as it is built for one config.

    Attributes:
        prefix: what stands before the backbone's names: `model`, `transformer`, `bert`.
        transforms: from names on disk to names in memory, in the order in which they are applied.
    """

    name: str
    prefix: str
    transforms: tuple[Transform, ...]

    @property
    def own(self) -> tuple[Transform, ...]:
        """The transforms but for those of old spellings, which every class reads and no save writes."""
        return self.transforms[: len(self.transforms) - len(_rules("legacy") or ())]

    @functools.cached_property
    def _any(self) -> re.Pattern[str] | None:
        """What some transform finds in a name; None where they look at a part of it (a sub-model's)."""
        if any(t.scope is not None for t in self.transforms):
            return None
        return re.compile("|".join(_NAMED_GROUP.sub("(?:", t.pattern.pattern) for t in self.transforms) or r"(?!)")

    def _is_touched(self, name: str) -> bool:
        """False for a name that no transform finds anything in: most, and many names are asked for."""
        return self._any is None or self._any.search(name) is not None

    @functools.cached_property
    def _is_plain(self) -> bool:
        """True where what becomes of a name depends neither on the numbers in it nor on names before it."""
        return all(
            t.kind in ("rename", "convert")
            and not _ASKS_FOR_NUMBER.search(_NAMED_GROUP.sub("(", t.pattern.pattern))
            and not _NUMBER.search(f".{t.base}.{t.scope}.")
            for t in self.transforms
        )

    @functools.cached_property
    def _by_form(self) -> dict[tuple[str, ...], tuple[str, str, Transform | None]]:
        """What became of names of one form, numbers aside: after renames, and in memory."""
        return {}

    def _forms(self, name: str, met: set[int]) -> tuple[str, str, Transform | None]:
        """The name after every rename, in memory, and what also changes its values: looked up by its form.

        A mixture has a hundred names of one form for each layer. Stand-ins take the place of the numbers.
        """
        if not self._is_plain and not self._is_touched(name):
            return name, name, None
        *rest, last = _NUMBER.split(name)
        if not rest or not self._is_plain or _STAND_IN in name or len(rest) > 16:
            return self._worked_out(name, met)
        texts, numbers = (*rest[::2], last), rest[1::2]
        if (found := self._by_form.get(texts)) is None:
            stand_ins = "".join(f"{text}{_STAND_IN}{at:02}" for at, text in enumerate(texts[:-1])) + texts[-1]
            found = self._by_form[texts] = self._worked_out(stand_ins, met)
        before, after = found[:2]
        for at, number in enumerate(numbers):
            before = before.replace(f"{_STAND_IN}{at:02}", number)
            after = after.replace(f"{_STAND_IN}{at:02}", number)
        return before, after, found[2]

    def renamed(self, name: str, met: set[int] | None = None) -> str:
        """The name after every rename, before values are changed."""
        return self._forms(name, set() if met is None else met)[0]

    def _worked_out(self, name: str, met: set[int]) -> tuple[str, str, Transform | None]:
        """What `_forms` looks up, by every pattern in turn."""
        before = self._renamed(name, met)
        for transform in self.transforms:
            if transform.kind == "convert":
                new = transform.apply(before, met)
                if new is not None:
                    return before, new, transform
        return before, before, None

    def _renamed(self, name: str, met: set[int]) -> str:
        for transform in self.transforms:
            if transform.kind != "convert":
                name = transform.apply(name, met) or name
        return name

    def in_memory(self, name: str, met: set[int] | None = None) -> tuple[str, Transform | None]:
        """The name in memory, and the entry that also changes the values, if one does."""
        return self._forms(name, set() if met is None else met)[1:]


def architecture(name: object, config: Mapping[str, Any]) -> Architecture | None:
    """The class of that name with its sub-models as the config chooses them; None where transformers has none."""
    if not isinstance(name, str) or name not in _classes():
        return None
    prefix = _classes()[name][1]
    transforms: list[Transform] = []
    seen: dict[str, list[str]] = {}
    for path, each, kind in _submodels(name, config):
        if _is_inside(path, seen.get(each, [])):
            continue
        found, by_class = _rules(each), True
        if found is None and not _is_inside(path, seen.get(kind, [])):
            found, by_class = _rules(kind), False
        if found is None:
            continue
        scope = path.removeprefix(prefix).removeprefix(".") if path else None
        transforms += [replace(t, scope=scope, base=prefix) for t in found] if path else found
        seen.setdefault(each, []).append(path)
        if not by_class:
            seen.setdefault(kind, []).append(path)
    return Architecture(name, prefix, (*transforms, *(_rules("legacy") or ())))


def _is_inside(path: str, claimed: list[str]) -> bool:
    return any(not other or path.startswith(f"{other}.") for other in claimed)


def _submodels(
    name: str, config: Mapping[str, Any], path: str = "", kind: str | None = None
) -> Iterator[tuple[str, str, str]]:
    """Path, class and model type of a model and of all models inside it, from the outside in."""
    yield path, name, kind or _classes()[name][0]
    for below, chosen, kind, *how in table()["parts"].get(name, ()):
        key, task = (*how, None, None)[:2]
        inner = config.get(key) if key else config
        inner = inner if isinstance(inner, Mapping) else {}
        asked = inner.get("model_type")
        if task and isinstance(asked, str) and asked != kind:
            chosen, kind = table()["auto"][task].get(asked), asked
        if chosen in _classes():
            yield from _submodels(chosen, inner, f"{path}.{below}" if path else below, kind)


def chosen_parts(name: str, config: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Path, key and class of each part of a class for which the config chooses another model than the default one."""
    for path, _, kind, *how in table()["parts"].get(name, ()):
        key, task = (*how, None, None)[:2]
        inner = config.get(key) if task else None
        asked = inner.get("model_type") if isinstance(inner, Mapping) else None
        if isinstance(asked, str) and asked != kind:
            tasks = (task, "SEQ_2_SEQ_LM") if task == "CAUSAL_LM" else (task,)
            cls = next((found for each in tasks if (found := auto_class(each, asked))), None)
            if cls is not None:
                yield path, key, cls


def auto_class(task: str, kind: str) -> str | None:
    """The class that transformers has for a task (`CAUSAL_LM`, `SEQ_CLS`, `TOKEN_CLS`, `base`) and a model type."""
    found = table()["auto"][task].get(kind)
    return found if isinstance(found, str) else None


def architectures(config: Mapping[str, Any], adapter: Mapping[str, Any]) -> tuple[Architecture, ...]:
    """Classes that an adapter may have been trained on, the likeliest first.

    Args:
        config: the base's `config.json`.
        adapter: `adapter_config.json`; without a task type it names the class, with one it names an auto class.
    """
    listed = config.get("architectures")
    names: list[object] = [_trained_class(adapter), *(listed if isinstance(listed, list) else [])]
    auto = table()["auto"]
    kind = config.get("model_type")
    if isinstance(kind, str):
        tasks = [t for t in (adapter.get("task_type"),) if isinstance(t, str) and t in auto]
        names += [auto[task].get(kind) for task in (*tasks, *_GENERAL_TASKS)]
    unique = dict.fromkeys(name for name in names if isinstance(name, str))
    return tuple(found for name in unique if (found := architecture(name, config)) is not None)


def _trained_class(adapter: Mapping[str, Any]) -> object:
    mapping = adapter.get("auto_mapping")
    return mapping.get("base_model_class") if isinstance(mapping, Mapping) else None


@dataclass(frozen=True)
class Classifier:
    """A class with a classification head.

    Attributes:
        own: its tensors outside the backbone, by their names in memory, which are those on disk.
        labels: the one of them that has a row for each label.
        adds: names inside the backbone that it lacks in another class (BERT's pooler), `N` for every number.
        lacks: names that the backbone has in another class, and not in this one.
    """

    architecture: Architecture
    own: tuple[str, ...]
    labels: str | None
    adds: tuple[str, ...]
    lacks: tuple[str, ...]

    def has(self, name: str) -> bool:
        """True where a tensor on disk is of the backbone or of the head; other classes have other heads."""
        memory, _ = self.architecture.in_memory(name)
        inside = memory.startswith(f"{self.architecture.prefix}.") and without_numbers(memory) not in self.lacks
        return inside or memory in self.own

    def missing(self, names: Iterable[str]) -> list[str]:
        """What must be there and is not among the names on disk: of the head, and of what other classes lack."""
        have = {without_numbers(self.architecture.in_memory(name)[0]) for name in names}
        return [name for name in (*self.own, *self.adds) if without_numbers(name) not in have]


def classifier(config: Mapping[str, Any], adapter: Mapping[str, Any]) -> Classifier | None:
    """The classification class that an adapter was trained on, if it was one and transformers has it."""
    task, name = adapter.get("task_type"), _trained_class(adapter)
    if task in ("SEQ_CLS", "TOKEN_CLS"):
        name = table()["auto"][task].get(str(config.get("model_type")))
    entry = table()["heads"].get(name) if isinstance(name, str) else None
    built = architecture(name, config) if entry else None
    if entry is None or built is None:
        return None
    adds, lacks = (tuple(entry.get(key, ())) for key in ("adds", "lacks"))
    return Classifier(built, tuple(entry["own"]), entry["labels"], adds, lacks)


def without_numbers(name: str) -> str:
    """The name with `N` for every number, as `Classifier.adds` has it."""
    return re.sub(r"\d+", "N", name)


@dataclass
class MemoryNames:
    """The tensors of a base by their names in memory."""

    architecture: Architecture
    _made: dict[str, str] = field(default_factory=dict)
    _disk: dict[str, str] = field(default_factory=dict)
    _clashes: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, architecture: Architecture, stored: Iterable[str], tied: Iterable[str]) -> MemoryNames:
        """Names of a base's tensors, and of those that exist only through a tie."""
        names = cls(architecture)
        met: set[int] = set()
        for name in sorted(stored, key=_natural):
            names._add(name, met, clash=True)
        for name in tied:
            names._add(name, met, clash=False)
        return names

    def _add(self, name: str, met: set[int], *, clash: bool) -> None:
        memory, converter = self.architecture.in_memory(name, met)
        if converter is None:
            first = self._disk.setdefault(memory, name)
            if clash and first != name:
                self._clashes.add(memory)
            return
        for target in converter.targets:
            made = memory.replace(converter.targets[0], target)
            self._made[made] = converter.operations
            if not made.endswith((".weight", ".bias")):
                self._made[made.rpartition(".")[0]] = converter.operations

    def find(self, name: str) -> str | None:
        """The name on disk of what is called `name` in memory; the backbone's prefix may be there or not."""
        for spelling in self._spellings(name):
            if spelling in self._disk and spelling not in self._clashes:
                return self._disk[spelling]
        return None

    def lacks_prefix(self, name: str) -> bool:
        """True where `name` is in the backbone, and the base's names do not have the backbone's prefix."""
        return name not in self._disk and name.removeprefix(f"{self.architecture.prefix}.") in self._disk

    def operations(self, name: str) -> str | None:
        """What transformers does on loading to the tensor `name`, or to its module's bare parameters, if anything."""
        _, converter = self.architecture.in_memory(name)
        if converter is not None:
            return converter.operations
        for spelling in self._spellings(name):
            for fused in (spelling, spelling.rpartition(".")[0]):
                if fused in self._made:
                    return self._made[fused]
        return None

    def _spellings(self, name: str) -> tuple[str, ...]:
        prefix = f"{self.architecture.prefix}."
        if prefix == ".":
            return (name,)
        return (name, name.removeprefix(prefix) if name.startswith(prefix) else prefix + name)


def _natural(name: str) -> list[tuple[int, int | str, int]]:
    """transformers' order of names: numbers by value, before words."""
    key: list[tuple[int, int | str, int]] = []
    for part in name.split("."):
        if part.isdecimal():
            key.append((0, int(part), 0))
        else:
            word = part.rstrip("0123456789")
            key.append((1, word, int(part[len(word) :] or -1)))
    return key
