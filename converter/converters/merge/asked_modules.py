"""What an adapter lacks of what PEFT asks for: modules that its siblings in other layers have, and saved modules.

`adapter_config.json` says which modules of the base are adapted. Of these PEFT makes every one that the base has, and
what the file does not hold stays as it was drawn: a LoRA without effect, a head that was never trained. Names of the
base count as they are in memory. A module whose like is adapted in no layer is not asked for: a pattern may be meant
for another class of the same base.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from converter.converters.merge.patterns import is_tame_regex
from converter.families.expected import Unknown, expected
from converter.families.factors import factor_in_name
from converter.families.family import family
from converter.families.memory_names import architectures
from converter.families.words import OUTPUT_MODULES

_LAYER = re.compile(r"(?<=\.)\d+(?=\.)", re.ASCII)
_PEFT = re.compile(r"^(?:base_model\.model\.)+")
_WRAPPER = re.compile(r"(?:\.base_layer)+$")
_MOST_PATTERN = 2_000
_MOST_LAYERS = 10_000


def modules_missing(
    keys: Iterable[str], adapter: Mapping[str, Any], base: Mapping[str, int], config: Mapping[str, Any]
) -> list[str]:
    """Modules of the base that PEFT adapts or replaces, and of which the adapter holds nothing.

    Args:
        keys: the adapter's tensors.
        adapter: `adapter_config.json`.
        base: the base's tensors with their numbers of dimensions, as they are on disk.
        config: the base's `config.json`.
    """
    held = [_PEFT.sub("", k) for k in keys]
    adapted = {m["module"] for k in held if (m := factor_in_name().match(k))}
    if not adapted and adapter.get("peft_type") != "LORA":
        return []
    linear, every, bare = _modules(base, adapter, config)
    kinds = {_LAYER.sub("N", name) for name in adapted if _LAYER.search(name)}
    candidates = linear if adapted <= set(linear) else every
    if adapter.get("target_parameters"):
        candidates = linear
    lacks = [n for n in candidates if n not in adapted and _is_chosen(n, adapter) and all(_is_layer(n, adapter))]
    is_listed = bool(adapted) and adapted <= {*every} and isinstance(adapter.get("target_modules"), list)
    found = [
        n
        for n in lacks
        if _LAYER.sub("N", n) in kinds or (is_listed and n in linear and not _is_apart(n, adapter, config))
    ]
    return [*found, *_saved_missing(held, adapter, every), *_parameters_missing(adapted, adapter, bare)]


def modules_untargeted(
    keys: Iterable[str], adapter: Mapping[str, Any], base: Mapping[str, int], config: Mapping[str, Any]
) -> list[str]:
    """Modules for which the adapter holds factors and that its config does not name: PEFT passes over the factors, or
    stops where the config names nothing of the base.

    Judged are names that are the base's own, on disk or in memory. A name of another release or trainer may be named
    by a word of the same.

    Args:
        keys: the adapter's tensors.
        adapter: `adapter_config.json`.
        base: the base's tensors with their numbers of dimensions, as they are on disk.
        config: the base's `config.json`.
    """
    targets, saved = adapter.get("target_modules"), adapter.get("modules_to_save")
    if targets is None or targets == "all-linear" or adapter.get("target_parameters"):
        return []
    if isinstance(targets, str) and not is_tame_regex(targets):
        return []
    found = (m["module"] for k in keys if (m := factor_in_name().match(_PEFT.sub("", k))))
    held = list(dict.fromkeys(_WRAPPER.sub("", name) for name in found))
    spellings = _spellings(base, adapter, config)
    if not held or any(name not in spellings for name in held):
        return []
    return [
        name
        for name in held
        if not any(is_target(each, adapter) for each in spellings[name])
        and not _is_apart(name, adapter, config)
        and not (isinstance(saved, list) and any(f".{s}." in f".{name}." for s in saved))
    ]


def _spellings(
    base: Mapping[str, int], adapter: Mapping[str, Any], config: Mapping[str, Any]
) -> dict[str, tuple[str, ...]]:
    """Each module's names, on disk and in memory, by either."""
    built = next(iter(architectures(config, adapter)), None)
    met: set[int] = set()
    found: dict[str, tuple[str, ...]] = {}
    for name in base:
        memory, converter = (name, None) if built is None else built.in_memory(name, met)
        if converter is None and name.endswith(".weight") and memory.endswith(".weight"):
            both = (name.removesuffix(".weight"), memory.removesuffix(".weight"))
            found |= dict.fromkeys(both, both)
    return found


def _modules(
    base: Mapping[str, int], adapter: Mapping[str, Any], config: Mapping[str, Any]
) -> tuple[list[str], list[str], list[str]]:
    """Modules with a matrix, and all with a weight, by their names in memory, none that a load makes of others; and
    all parameters, stacks of experts that a load makes among them.
    """
    built = next(iter(architectures(config, adapter)), None)
    copies = _copies(adapter.get("layer_replication"))
    linear: list[str] = []
    every: list[str] = []
    bare: dict[str, None] = {}
    met: set[int] = set()
    left = _left_by_the_class(base, config)
    for name, dimensions in base.items():
        if name in left:
            continue
        memory, converter = (name, None) if built is None else built.in_memory(name, met)
        bare[memory] = None
        if converter is None and memory.endswith(".weight"):
            modules = _replicated(memory.removesuffix(".weight"), copies)
            every += modules
            if dimensions > 1:
                linear += modules
    return linear, every, list(bare)


def _left_by_the_class(base: Mapping[str, int], config: Mapping[str, Any]) -> frozenset[str]:
    """Tensors that the class of the base has no place for, such as layers for multi-token prediction: a load passes
    over them, and PEFT never sees them. None where most names are none of the class's: they are an older form's.
    """
    wanted = expected(config)
    if isinstance(wanted, Unknown):
        return frozenset()
    left = frozenset(name for name in base if name not in wanted.saved)
    return left if 2 * len(left) < len(base) else frozenset()


def _copies(replication: Any) -> list[int] | None:
    """The base's layer that each layer of a model with `layer_replication` is; None where it is not set."""
    if not isinstance(replication, list) or not replication:
        return None
    pairs = [p for p in replication if isinstance(p, list) and len(p) == 2 and all(isinstance(n, int) for n in p)]
    if len(pairs) != len(replication) or sum(stop - start for start, stop in pairs) > _MOST_LAYERS:
        return None
    return [n for start, stop in pairs for n in range(start, stop)]


def _replicated(module: str, copies: list[int] | None) -> list[str]:
    """A module under the numbers of all layers that are its own."""
    number = _LAYER.search(module)
    if copies is None or number is None:
        return [module]
    at, end = number.span()
    return [f"{module[:at]}{n}{module[end:]}" for n, old in enumerate(copies) if old == int(number[0])]


def _is_apart(module: str, adapter: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    """True for what a class may lack, an output embedding or a head, and for what is saved whole."""
    if _matches(module, adapter.get("modules_to_save")) or module.rpartition(".")[2] in OUTPUT_MODULES:
        return True
    return any(n.startswith(f"{module}.") for names in family(config).head_names.values() for n in names)


def is_target(name: str, adapter: Mapping[str, Any]) -> bool:
    """As PEFT matches: a list by the whole name or its end, a string as a pattern; what is excluded is not one."""
    return _is_chosen(name, adapter) and any(_is_layer(name, adapter))


def _is_chosen(name: str, adapter: Mapping[str, Any]) -> bool:
    wanted = adapter.get("target_modules")
    chosen = wanted == "all-linear" or _matches(name, wanted)
    return chosen and not _matches(name, adapter.get("exclude_modules"))


def _matches(name: str, wanted: Any) -> bool:
    if isinstance(wanted, str):
        try:
            return len(wanted) <= _MOST_PATTERN and re.fullmatch(wanted, name) is not None
        except re.error:
            return False
    if not isinstance(wanted, list):
        return False
    return any(isinstance(w, str) and (name == w or name.endswith(f".{w}")) for w in wanted)


def _is_layer(name: str, adapter: Mapping[str, Any]) -> list[bool]:
    """Whether a module is of the layers that are trained: as PEFT 0.20 reads its name, and as earlier releases do.

    Of several numbers (`block.1.layer.0`) it takes the first, and took the last.
    """
    layers, stacks = adapter.get("layers_to_transform"), adapter.get("layers_pattern")
    if layers is None or layers == []:
        return [True]
    wanted = layers if isinstance(layers, list) else [layers]
    names = [stacks] if isinstance(stacks, str) else stacks if isinstance(stacks, list) else []
    pieces = name.split(".")
    numbers = [
        int(number)
        for before, number in itertools.pairwise(pieces[:-1])
        if number.isdecimal() and (not any(names) or before in names)
    ]
    return [n in wanted for n in (numbers[0], numbers[-1])] if numbers else [False]


def _parameters_missing(adapted: set[str], adapter: Mapping[str, Any], bare: list[str]) -> list[str]:
    """Modules with targeted parameters of which the adapter holds no factor, and of their like in other layers some."""
    targets = adapter.get("target_parameters")
    if not isinstance(targets, list) or not targets:
        return []
    held = {_WRAPPER.sub("", name) for name in adapted}
    kinds = {_LAYER.sub("N", name) for name in held if _LAYER.search(name)}
    modules = dict.fromkeys(name.rpartition(".")[0] for name in bare if _matches(name, targets))
    return [n for n in modules if n not in held and _LAYER.sub("N", n) in kinds]


def _saved_missing(held: list[str], adapter: Mapping[str, Any], modules: list[str]) -> Iterator[str]:
    """Modules that the config says were trained whole, which the base has and the adapter does not hold."""
    saved = adapter.get("modules_to_save")
    for name in modules if isinstance(saved, list) else []:
        if _matches(name, saved) and not any(k.startswith(f"{name}.") for k in held):
            yield name
