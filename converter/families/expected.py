"""What a loader asks for: names on disk, shapes and ties of the class that a config names, and what a load passes over.

Classes that `implied_shapes.json` has are computed from their formulas; of others the installed transformers is asked,
in a child process (see `expected_child`). Where neither knows a family the answer is `Unknown`, with the reason: then
names and shapes are not checked, and nothing is called sound.

`compare` matches a set of names with that as a load does: names on disk, names in memory, old spellings, names without
the backbone's prefix, experts one by one or stacked, and quantised layouts.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from converter.families import config_faults, config_types, implied, memory_names
from converter.families.implied import Shape
from converter.text import show

_NAMED = re.compile(r"[A-Za-z_]\w{0,200}", re.ASCII)
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)", re.ASCII)


@dataclass(frozen=True)
class Expected:
    """What a class asks for.

    Attributes:
        name: the class.
        saved: names on disk with their shapes, as `save_pretrained` writes them.
        memory: names in memory with their shapes; empty where the formulas do not say.
        ties: groups of names in memory that are one tensor: one of each has to be stored.
        passes_missing, passes_unexpected: patterns of names in memory that a load does not report.
        unsaved: names in memory that a save leaves out.
        prefix: what stands before the backbone's names.
        free: what lies outside of the backbone is not asked for: the class is not the one that config.json names.
        source: where it is from, in words.
    """

    name: str
    saved: Mapping[str, Shape]
    memory: Mapping[str, Shape] = field(default_factory=dict)
    ties: tuple[tuple[str, ...], ...] = ()
    passes_missing: tuple[str, ...] = ()
    passes_unexpected: tuple[str, ...] = ()
    unsaved: frozenset[str] = frozenset()
    prefix: str = ""
    free: bool = False
    source: str = ""

    def passes(self, name: str, *, missing: bool) -> bool:
        """True for a name in memory that a load passes over, where it is missing or where it is too many."""
        patterns = self.passes_missing if missing else self.passes_unexpected
        return any(re.search(p, name) for p in patterns)

    def is_outside(self, name: str) -> bool:
        """True for a name that is not in the backbone: of a head, or of the output embedding."""
        return self._has_prefix and not name.startswith(f"{self.prefix}.")

    @functools.cached_property
    def _has_prefix(self) -> bool:
        """False for classes, as T5's, whose prefix stands before none of their names."""
        return bool(self.prefix) and any(n.startswith(f"{self.prefix}.") for n in (*self.saved, *self.memory))


@dataclass(frozen=True)
class Unknown:
    """A family that neither the formulas nor transformers know, and why.

    Attributes:
        refused: the installed transformers knows the class, and refuses to build it of this config.
    """

    reason: str
    refused: bool = False

    @property
    def words(self) -> str:
        """For every verdict."""
        if self.refused:
            return f"transformers does not build the model that config.json describes ({show(self.reason)})"
        return f"names and shapes not checked: family unknown ({show(self.reason)})"


def expected(config: Mapping[str, Any]) -> Expected | Unknown:
    """What the class that a config names asks for."""
    try:
        key = json.dumps(config, sort_keys=True)
    except (TypeError, ValueError):
        return Unknown("config.json holds what JSON does not")
    return _expected(key)


@functools.lru_cache(maxsize=16)
def _expected(key: str) -> Expected | Unknown:
    config: dict[str, Any] = json.loads(key)
    if (fault := config_faults.fault_of(config)) is not None:
        return Unknown(fault, refused=True)
    named = implied.class_of(config)
    if named is not None:
        found = _of_class(named, config)
        if isinstance(found, Expected):
            return found
        if named in memory_names.class_names() or config.get("auto_map"):
            return found
    kind = config.get("model_type")
    if not isinstance(kind, str):
        return Unknown("config.json names no class and no model type")
    for task in ("CAUSAL_LM", "SEQ_2_SEQ_LM", "IMAGE_TEXT", "base"):
        other = memory_names.auto_class(task, kind)
        if other is not None:
            found = _of_class(other, config)
            return _freed(found) if isinstance(found, Expected) else found
    return Unknown(f"model type {kind}" if named is None else f"class {named} of model type {kind}")


def _freed(found: Expected) -> Expected:
    return dataclasses.replace(found, free=True)


def _of_class(name: str, config: Mapping[str, Any]) -> Expected | Unknown:
    if not _NAMED.fullmatch(name):
        return Unknown("config.json names a class that is not a word")
    table = implied.implied({**config, "architectures": [name]})
    if table is not None and config_types.is_plain(config):
        return _of_table(name, table, config)
    from converter.families import expected_child  # it imports what starts processes, and is rarely needed

    found = expected_child.described(name, config)
    if "saved" not in found:
        is_refused = bool(found.get("refused")) and not _is_newer(config, expected_child.version())
        if table is not None and not is_refused:
            return _of_table(name, table, config)
        return Unknown(str(found.get("unknown"))[:300], is_refused)
    return Expected(
        name,
        {n: tuple(s) for n, s in found["saved"].items()},
        {n: tuple(s) for n, s in found["memory"].items()},
        tuple(tuple(g) for g in found["ties"]),
        tuple(filter(_is_pattern, found["passes_missing"])),
        (*filter(_is_pattern, found["passes_unexpected"]), *_after_the_last(found["passes_unexpected"], config)),
        frozenset(found["unsaved"]),
        found["prefix"],
        source=f"transformers {found['transformers']}",
    )


def _of_table(name: str, table: implied.Implied, config: Mapping[str, Any]) -> Expected:
    built = memory_names.architecture(name, config)
    return Expected(
        name,
        {**table.shapes},
        {**table.shapes, **table.optional},
        ties=_table_ties(table),
        passes_unexpected=(*table.passes, *_after_the_last(table.passes, config)),
        prefix=built.prefix if built is not None else "",
        source=f"formulas of transformers {implied.version()}",
    )


_NUMBERED = re.compile(r"model\\\.layers\\\.\d+\.\*")
"""How transformers passes over layers for multi-token prediction: by the number in models of the published sizes."""


def _after_the_last(passes: Iterable[str], config: Mapping[str, Any]) -> tuple[str, ...]:
    """The same for a model of another size, whose config says that it has such layers."""
    layers, extra = config.get("num_hidden_layers"), config.get("num_nextn_predict_layers")
    if type(layers) is not int or type(extra) is not int or not any(map(_NUMBERED.fullmatch, passes)):
        return ()
    return tuple(rf"model\.layers\.{layers + n}\." for n in range(min(extra, 64)))


def _is_newer(config: Mapping[str, Any], installed: str) -> bool:
    """True for a config that a newer transformers than the installed one wrote, or that no transformers did."""
    written = config.get("transformers_version")
    if not isinstance(written, str):
        return True
    return _release(written) > _release(installed)


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d{1,6}", version)[:2])


def _is_pattern(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True


def _table_ties(table: implied.Implied) -> tuple[tuple[str, ...], ...]:
    """A tied output with the embedding: the first tensor of its shape."""
    groups = []
    for name, shape in table.optional.items():
        partner = next((n for n, s in table.shapes.items() if s == shape), None)
        if partner is not None:
            groups.append((partner, name))
    return tuple(groups)


@dataclass(frozen=True)
class Comparison:
    """How a set of tensors differs from what is asked for.

    Attributes:
        missing: names on disk that are asked for and not there, with their shapes.
        unexpected: names that nothing asks for, with their shapes.
        misshapen: names with the shape that is there and the one that is asked for.
        asked: how many are asked for.
    """

    missing: Mapping[str, Shape]
    unexpected: Mapping[str, Shape]
    misshapen: Mapping[str, tuple[Shape, Shape]]
    asked: int

    @property
    def is_renamed(self) -> bool:
        """True where as many names are too many as are missing: they may be those, and nothing is filled."""
        return len(self.unexpected) >= max(len(self.missing), 1)

    def __bool__(self) -> bool:
        """True where anything differs."""
        return bool(self.missing or self.unexpected or self.misshapen)


def compare(stored: Mapping[str, Shape], wanted: Expected, config: Mapping[str, Any]) -> Comparison:
    """A set of names and shapes against what is asked for, matched as a load matches them."""
    return _Matching(stored, wanted, config).result()


@dataclass
class _Matching:
    stored: Mapping[str, Shape]
    wanted: Expected
    config: Mapping[str, Any]
    found: set[str] = field(default_factory=set)
    present: set[str] = field(default_factory=set)
    other: dict[str, tuple[Shape, Shape]] = field(default_factory=dict)
    unexpected: dict[str, Shape] = field(default_factory=dict)
    free_shape: set[str] = field(default_factory=set)

    def result(self) -> Comparison:
        saved = self.wanted.saved
        for name in self.stored:
            if name in saved:
                self._match(name, name)
        rest = [n for n in self.stored if n not in saved]
        lacking = [n for n in saved if n not in self.stored]
        if rest or lacking:
            self._match_as_a_load(rest, lacking)
        missing = {n: saved[n] for n in lacking if n not in self.found and not self._is_passed(n)}
        misshapen = {n: pair for n, pair in self.other.items() if self._base(n) not in self.free_shape}
        return Comparison(missing, self.unexpected, misshapen, len(saved))

    def _match(self, name: str, disk: str) -> None:
        self.found.add(disk)
        self._shape(name, self.wanted.saved[disk])

    def _shape(self, name: str, asked: Shape) -> None:
        if self.stored[name] != asked:
            self.other[name] = (self.stored[name], asked)

    # Names that are not those on disk

    def _match_as_a_load(self, rest: list[str], lacking: list[str]) -> None:
        """By names in memory, in the order of a load."""
        self.built = memory_names.architecture(self.wanted.name, self.config)
        self.before: dict[str, str] = {}
        self.stacks: dict[str, list[str]] = {}
        met: set[int] = set()
        for disk in memory_names.sorted_names(self.wanted.saved):
            before, after = self._in_memory(disk, met)
            self.before.setdefault(before, disk)
            if after is not None:
                self.stacks.setdefault(after, []).append(disk)
        self.memory_of = {d: n for n, d in self.before.items()}
        met = set()
        quantised = self.config.get("quantization_config") is not None
        left = []
        for name in memory_names.sorted_names(rest):
            before, after = self._in_memory(name, met)
            if not any(self._place(name, each) for each in self._spellings(name, before, after)):
                left.append((name, before))
        for name, before in left:
            if not (quantised and self._is_quantised(name, before)) and not self.wanted.passes(before, missing=False):
                self.unexpected[name] = self.stored[name]
        self.present |= {self.memory_of.get(d, d) for d in self.found}

    def _in_memory(self, name: str, met: set[int]) -> tuple[str, str | None]:
        """The name after every rename, and the stack or other tensor that it becomes a part of."""
        if self.built is None:
            return name, None
        before = self.built.renamed(name, met)
        after, converter = self.built.in_memory(name, met)
        return before, after if converter is not None else None

    def _spellings(self, name: str, before: str, after: str | None) -> Iterator[str]:
        """What a load tries: the name as renamed, without and with the backbone's prefix; else as it is."""
        prefix = f"{self.wanted.prefix}." if self.wanted.prefix else ""
        for each in (before, name):
            if prefix and each.startswith(prefix):
                yield each.removeprefix(prefix)
            elif prefix:
                yield prefix + each
            yield each

    def _place(self, name: str, spelling: str) -> bool:
        """Match a tensor with what a spelling of its name is in memory."""
        wanted = self.wanted
        if spelling in self.before:
            disk = self.before[spelling]
            self._match(name, disk)
            return True
        if spelling in self.stacks:
            self.found.update(self.stacks[spelling])
            shape = wanted.memory.get(spelling) or self._stacked(spelling)
            if shape is not None:
                self._shape(name, shape)
            return True
        if spelling in wanted.memory:
            self.present.add(spelling)
            self._shape(name, wanted.memory[spelling])
            return True
        return False

    def _stacked(self, target: str) -> Shape | None:
        """The shape of a stack of experts, from those of its parts."""
        parts = self.stacks[target]
        shapes = {self.wanted.saved[p] for p in parts}
        kinds = len({_NUMBER.sub("N", p) for p in parts})
        if len(shapes) != 1 or len(parts) % kinds:
            return None
        rows, *others = next(iter(shapes))
        return (len(parts) // kinds, rows * kinds, *others)

    def _is_quantised(self, name: str, before: str) -> bool:
        """True for a part of a quantised tensor: `X.qweight`, `X.weight_scale`, `X.weight.absmax`, `X_blocks`."""
        for each in self._spellings(name, before, None):
            stem = each
            while "." in stem:
                for candidate in (stem, f"{stem}.weight", re.sub(r"_(?:blocks|scales|scale_inv|scale)$", "", stem)):
                    disk = self.before.get(candidate) if candidate != each else None
                    if disk is not None:
                        self.found.add(disk)
                        self.free_shape.add(self._base(disk))
                        return True
                    if candidate != each and candidate in self.stacks:
                        self.found.update(self.stacks[candidate])
                        return True
                stem = stem.rpartition(".")[0] if stem == each or "." in stem else ""
                if each.count(".") - stem.count(".") > 2:
                    break
        return False

    def _base(self, name: str) -> str:
        return name.removesuffix(".weight")

    # What is not there

    def _is_passed(self, disk: str) -> bool:
        """True where a tie has it under another name, or a load does not ask for it."""
        memory = self.memory_of.get(disk, disk)
        for group in self.wanted.ties:
            if memory in group and any(n in self.present for n in group if n != memory):
                return True
        is_free = self.wanted.free and self.wanted.is_outside(memory)
        return is_free or memory in self.wanted.unsaved or self.wanted.passes(memory, missing=True)
