"""What an adapter's own config and its other layers say of its tensors, where no base is at hand to compare with.

A base decides more; an adapter is often alone. What it says itself: the ranks, the modules that are targeted, and that
layers of one kind have the same modules in the same shapes. A hybrid's layers differ in many modules at once, and so
does a model whose widths differ by layer; one module of one layer that differs alone was lost, cut or renamed.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from converter.converters.merge.asked_modules import is_target
from converter.converters.merge.patterns import is_tame_regex, matching
from converter.core.checkpoint import Checkpoint
from converter.core.tensors.dtypes import TensorInfo
from converter.errors import Refused
from converter.families.factors import declared, factor_in_name, factor_pairs, shared_names
from converter.families.words import HEAD_MODULES, LORA_EMBEDDING_PAIR, LORA_PAIR, PEFT_PREFIX, without_wrappers
from converter.text import fold, show

INCONSISTENT, UNTARGETED = "adapter-inconsistent", "adapter-untargeted"

_PEFT = re.compile(rf"^(?:{re.escape(PEFT_PREFIX)})+")
_LAYER = re.compile(
    r"^(?P<stack>(?:.*?\.)?(?:layers?|h|blocks?|resblocks)\.)(?P<number>\d{1,6})\.(?P<rest>.+)$", re.ASCII
)
_PROMPTS = {"PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "MULTITASK_PROMPT_TUNING"}
_PROMPT = "prompt_embeddings"
_MOST_MATCHES = 1_000_000
"""Pairs of a pattern and a factor that are tried; more would keep a reader busy, and a merge matches them itself."""
_OWN_TARGETS = ("TRAINABLE_TOKENS", "LN_TUNING")
"""Methods that know their modules where the config names none."""


@dataclass(frozen=True)
class Contradiction:
    """One way in which an adapter contradicts itself.

    Attributes:
        code: of the refusal and the finding.
        names: tensors that are there, and modules that are not.
    """

    code: str
    text: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class _Factor:
    key: str
    module: str
    kind: str
    info: TensorInfo


def inconsistency(adapter: Checkpoint, *, alone: bool) -> Refused | None:
    """The refusal of an adapter that contradicts itself; None where it does not.

    Args:
        alone: see `contradictions`.
    """
    held = {name: tensor.info for name, tensor in adapter.tensors.items()}
    found = contradictions(held, adapter.config, alone=alone)
    if not found:
        return None
    return Refused(found[0].code, "; ".join(each.text for each in found), where=show(adapter.origin.asked))


def contradictions(held: Mapping[str, TensorInfo], config: Mapping[str, Any], *, alone: bool) -> list[Contradiction]:
    """Everything in an adapter that can't be true together, from its names, shapes and config.

    Args:
        alone: no base is at hand; where one is, a merge compares ranks, shapes and modules with it.
    """
    is_known = config.get("peft_type") in {d.peft_type for d in declared()}
    parsed = (_factor(key, info, config, is_known=is_known) for key, info in held.items())
    factors = [each for each in parsed if each is not None]
    filled = [f for f in factors if f.info.numel]
    found = [*_prompt(held, config), *_types(held, factors)]
    if is_known and not alone:
        return [*found, *_targets_nothing(factors, config)]
    found += _untargeted(factors, config)
    ranks = list(_ranks(filled, config))
    shapes = [] if ranks else list(_shapes(_of_usual_rank(filled, config)))
    return [*found, *ranks, *shapes, *_partial(factors), *_modules(factors, config)]


def _factor(key: str, info: TensorInfo, config: Mapping[str, Any], *, is_known: bool) -> _Factor | None:
    """A key as a factor of a module; of a method that is not merged here what stands behind a targeted module."""
    if key.rpartition(".")[2] in shared_names():
        return None
    name = _PEFT.sub("", without_wrappers(key))
    if match := factor_in_name().match(name):
        return _Factor(key, match["module"], match["kind"], info)
    if is_known:
        return None
    pieces = name.split(".")
    modules = (".".join(pieces[:n]) for n in range(len(pieces) - 1, 0, -1))
    module = next((m for m in modules if is_target(m, config)), None)
    return None if module is None else _Factor(key, module, name.removeprefix(f"{module}."), info)


def _prompt(held: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> Iterator[Contradiction]:
    """A trained prompt is there, with as many rows as the config counts."""
    kind = config.get("peft_type")
    if kind not in _PROMPTS or not held:
        return
    if _PROMPT not in held:
        yield Contradiction(INCONSISTENT, f"the trained prompt `{_PROMPT}` is in no file", (_PROMPT,))
        return
    rows = config.get("num_virtual_tokens")
    shape = held[_PROMPT].shape
    copies = config.get("num_transformer_submodules")
    counts = {rows, rows * copies} if isinstance(rows, int) and isinstance(copies, int) else {rows}
    width, layers = config.get("token_dim"), config.get("num_layers")
    per_row = 2 * layers if kind == "PREFIX_TUNING" and isinstance(layers, int) else 1
    is_wide = isinstance(width, int) and len(shape) == 2 and shape[1] == width * per_row
    if isinstance(rows, int) and (len(shape) != 2 or shape[0] not in counts or not (is_wide or width is None)):
        text = f"`{_PROMPT}` is {list(shape)}, and the config counts {rows} tokens of {show(width)} values"
        yield Contradiction(INCONSISTENT, text, (_PROMPT,))


def _types(held: Mapping[str, TensorInfo], factors: Iterable[_Factor]) -> Iterator[Contradiction]:
    """Trained numbers are floating-point; only lists of places are whole numbers."""
    odd = tuple(f.key for f in factors if not f.info.dtype.is_float and "indices" not in f.kind)
    apart = {_PROMPT, *shared_names()}
    odd += tuple(n for n, i in held.items() if n.rpartition(".")[2] in apart and not i.dtype.is_float)
    if odd:
        types = fold(sorted({held[n].dtype.torch_name for n in odd}))
        yield Contradiction(INCONSISTENT, f"{len(odd)} tensors are of {types}, which nothing trains: {fold(odd)}", odd)


def _untargeted(factors: Iterable[_Factor], config: Mapping[str, Any]) -> Iterator[Contradiction]:
    """PEFT puts nothing on a module that the config does not target, and passes over its factors."""
    lost = tuple(m for m in _modules_to_target(factors, config) if not is_target(m, config))
    if lost:
        yield Contradiction(UNTARGETED, untargeted_text(lost), lost)


def untargeted_text(modules: Sequence[str]) -> str:
    """What is said of modules that have factors and are not targeted."""
    return f"adapter_config.json does not target {fold(modules)}: PEFT would pass over their factors"


def _targets_nothing(factors: Iterable[_Factor], config: Mapping[str, Any]) -> Iterator[Contradiction]:
    """Where a base may have its modules under other names: a config that targets nothing under any; PEFT stops."""
    modules = _modules_to_target(factors, config)
    targets, layers = config.get("target_modules"), config.get("layers_to_transform")
    if not modules or targets is None:
        return
    everywhere = {**config, "layers_to_transform": None}
    if not targets or not isinstance(targets, str | list | dict):
        what = f"target_modules of adapter_config.json is {show(targets)}"
    elif all(is_target(m, everywhere) and not is_target(m, config) for m in modules):
        what = f"layers_to_transform of adapter_config.json is {show(layers)}"
    else:
        return
    yield Contradiction(
        UNTARGETED, f"{what}, which is none of {fold(modules)}: PEFT would not load their factors", modules
    )


def _modules_to_target(factors: Iterable[_Factor], config: Mapping[str, Any]) -> tuple[str, ...]:
    """The modules that have factors and need a target; none where the config has other ways to name them."""
    targets = config.get("target_modules")
    is_read = not isinstance(targets, str) or is_tame_regex(targets)
    if (
        "target_modules" not in config
        or config.get("target_parameters")
        or config.get("peft_type") in (None, *_OWN_TARGETS)
        or not is_read
    ):
        return ()
    # Heads are judged as heads.
    return tuple(dict.fromkeys(f.module for f in factors if f.module.rpartition(".")[2] not in HEAD_MODULES))


def _ranks(factors: Iterable[_Factor], config: Mapping[str, Any]) -> Iterator[Contradiction]:
    """The ranks of plain LoRA's matrices are those of the config."""
    variants = [d.switch for d in declared() if d.peft_type == "LORA" and d.switch and d.switch != "use_dora"]
    patterns = config.get("rank_pattern") or {}
    default = config.get("r", 8)
    if config.get("peft_type") != "LORA" or any(config.get(v) for v in variants) or config.get("target_parameters"):
        return
    if not isinstance(default, int) or not isinstance(patterns, dict):
        return
    held = list(factors)
    if len(patterns) * len(held) > _MOST_MATCHES or not all(map(is_tame_regex, patterns)):
        return
    odd: dict[str, None] = {}
    for each in held:
        sides = (LORA_PAIR, LORA_EMBEDDING_PAIR)
        side = next((pair.index(each.kind) for pair in sides if each.kind in pair), None)
        if side is None or each.key.endswith(".bias") or (len(each.info.shape) == 3 and "experts" in each.module):
            continue
        wanted = matching(patterns, each.module, default)
        if len(each.info.shape) <= side or each.info.shape[side] != wanted:
            odd[each.key] = None
    if odd:
        text = (
            f"the ranks of {len(odd)} tensors are not those of adapter_config.json (r = {show(default)}): {fold(odd)}"
        )
        yield Contradiction(INCONSISTENT, text, tuple(odd))


def _of_usual_rank(factors: Sequence[_Factor], config: Mapping[str, Any]) -> list[_Factor]:
    """Factors whose rank is that of the others: those of modules that `rank_pattern` names have one of their own."""
    patterns = config.get("rank_pattern")
    if not patterns:
        return list(factors)
    is_read = isinstance(patterns, dict) and len(patterns) * len(factors) <= _MOST_MATCHES
    # AdaLoRA's pattern is of the ranks that training left, by names of its own.
    if config.get("peft_type") == "ADALORA" or not is_read or not all(map(is_tame_regex, patterns)):
        return []
    return [f for f in factors if matching(patterns, f.module, None) is None]


def _shapes(factors: Iterable[_Factor]) -> Iterator[Contradiction]:
    """A module of one layer has the shapes of its like in the others, unless the layers are of several widths."""
    groups: dict[tuple[str, str], list[_Factor]] = {}
    for each in factors:
        if match := _LAYER.match(each.module):
            tail = _PEFT.sub("", without_wrappers(each.key)).removeprefix(each.module)
            groups.setdefault((f"{match['stack']}N.{match['rest']}", tail), []).append(each)
    odd = {group: _deviating(found) for group, found in groups.items()}
    odd = {group: found for group, found in odd.items() if found}
    if len({module for module, _ in odd}) != 1 and not _are_exchanged(list(odd.values())):
        return  # in several modules at once it is how the model is built
    names = tuple(f.key for found in odd.values() for f in found)
    shapes = "; ".join(f"{show(f.key)} {list(f.info.shape)}" for found in odd.values() for f in found[:2])
    yield Contradiction(INCONSISTENT, f"shapes differ from those of the same module in other layers: {shapes}", names)


def _deviating(found: list[_Factor]) -> list[_Factor]:
    """The one whose shape no other has; both where there are two."""
    counts = Counter(f.info.shape for f in found)
    if len(counts) != 2:
        return []
    usual, _ = counts.most_common(1)[0]
    others = [f for f in found if f.info.shape != usual]
    return found if len(found) == 2 else others if len(others) == 1 else []


def _are_exchanged(odd: Sequence[Sequence[_Factor]]) -> bool:
    """True for two modules of which, in one layer, each has the shape that the other has in the other layers."""
    if len(odd) != 2 or any(len(found) != 2 for found in odd):
        return False
    (a, b), (c, d) = ([f.info.shape for f in found] for found in odd)
    return a == d and b == c


def _partial(factors: Iterable[_Factor]) -> Iterator[Contradiction]:
    """A module that has a part of the factors that most have, where no pair says so already."""
    kinds: dict[str, set[str]] = {}
    for each in factors:
        kinds.setdefault(each.module, set()).add(each.kind)
    counts = Counter(frozenset(found) for found in kinds.values())
    (usual, most), *others = counts.most_common() or [(frozenset[str](), 0)]
    if most < 2 or any(n == most for _, n in others):
        return
    halves = [set(pair) for pair in factor_pairs()]
    lacking = [m for m, k in kinds.items() if k < usual and not any(len(k & pair) == 1 for pair in halves)]
    if lacking:
        parts = fold(sorted(set().union(*(usual - kinds[m] for m in lacking))))
        yield Contradiction(INCONSISTENT, f"{fold(lacking)} lack {parts}, which the other modules have", tuple(lacking))


def _modules(factors: Iterable[_Factor], config: Mapping[str, Any]) -> Iterator[Contradiction]:
    """One layer that lacks what all its like have, and a layer that is left out of a row of them."""
    stacks: dict[str, dict[int, set[str]]] = {}
    for each in factors:
        if match := _LAYER.match(each.module):
            stacks.setdefault(match["stack"], {}).setdefault(int(match["number"]), set()).add(match["rest"])
    lost: list[str] = []
    alone: list[str] = []
    for stack, layers in stacks.items():
        lost += (f"{stack}{n}.{rest}" for n, rest in _lacking(layers))
        for number in _gaps(set(layers)):
            usual = set.intersection(*layers.values()) or set[str]().union(*layers.values())
            lost += (f"{stack}{number}.{rest}" for rest in sorted(usual))
        alone += (f"{stack}{n}.{rest}" for n in _strays(set(layers)) for rest in sorted(layers[n]))
    lost = [name for name in lost if is_target(name, config)]
    if lost:
        text = f"{len(lost)} modules have no factors, and their like in other layers have: {fold(lost)}"
        yield Contradiction(INCONSISTENT, text, tuple(lost))
    if alone and config.get("layers_to_transform") is None and not config.get("layer_replication"):
        text = f"factors are of a layer far behind the last of the others: {fold(alone)}"
        yield Contradiction(INCONSISTENT, text, tuple(alone))


def _lacking(layers: Mapping[int, set[str]]) -> Iterator[tuple[int, str]]:
    """Modules that one layer alone lacks, whose neighbours under the same parent it has, and nothing in their place."""
    counts = Counter(itertools.chain.from_iterable(layers.values()))
    for number, held in layers.items():
        for rest in sorted(r for r, n in counts.items() if n == len(layers) - 1 and r not in held):
            parent = _parent(rest)
            mine = {r for r in held if _parent(r) == parent}
            theirs = {r for n, other in layers.items() if n != number for r in other if _parent(r) == parent}
            if mine and mine < theirs and not _is_behind(rest, mine):
                yield number, rest


def _parent(rest: str) -> str:
    """The module that a module is in; of a numbered one, what is numbered."""
    parent = rest.rpartition(".")[0]
    return parent.rpartition(".")[0] if parent.rpartition(".")[2].isdecimal() else parent


def _is_behind(rest: str, held: Iterable[str]) -> bool:
    """True where a numbered module comes after all that the layer has: stages differ in depth."""
    number = rest.rpartition(".")[0].rpartition(".")[2]
    numbers = [int(n) for r in held if (n := r.rpartition(".")[0].rpartition(".")[2]).isdecimal()]
    return number.isdecimal() and bool(numbers) and int(number) > max(numbers)


def _gaps(numbers: set[int]) -> list[int]:
    """Layers that are left out of a row of which most are there; evenly spaced ones are of another kind."""
    row = range(min(numbers), max(numbers) + 1)
    missing = [n for n in row if n not in numbers] if 2 * len(numbers) > len(row) else []
    if not missing:
        return []
    steps = {b - a for a, b in itertools.pairwise(missing)}
    return missing if len(missing) == 1 or len(steps) > 1 else []


def _strays(numbers: set[int]) -> list[int]:
    """The last layer, where the others are a row from 0 that ends far before it."""
    *others, last = sorted(numbers)
    is_row = len(others) > 1 and others == list(range(len(others)))
    return [last] if is_row and last > 2 * len(others) else []
