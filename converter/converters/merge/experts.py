"""LoRA over experts: which modules of an adapter are over which matrices of which stack of the base.

PEFT wraps a bare parameter (`target_parameters`), and a wrapper around a wrapper for each further one of the module:
`experts.base_layer.lora_A` is of the parameter that is declared first, `experts.lora_A` of the last. Its factors hold
all experts: A `[experts * r, in]` has the experts one after another, B `[out, r * experts]` has them side by side for
each rank. Adapters of transformers 4 have a module for each expert. Either kind merges into a base that holds stacks,
and into one that holds experts one by one.

Source: `ParamWrapper`, https://github.com/huggingface/peft/blob/v0.21.2/src/peft/tuners/lora/layer.py
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from converter.converters.merge.adapter_keys import Module
from converter.core.context import Context
from converter.core.tensors.nodes import LazyTensor
from converter.errors import Refused
from converter.families.memory_names import Architecture
from converter.families.stacks import Stack, find_stacks, made_otherwise, one_of, parameter_order
from converter.families.words import LORA_PAIR
from converter.text import fold, show

_WRAPPED = re.compile(r"^(?P<module>.+?)(?P<levels>(?:\.base_layer)*)$")
_BY_NUMBER = re.compile(r"^(?P<module>.+)\.(?P<stack>gate_up_proj|down_proj)s\.(?P<expert>\d+)$", re.ASCII)
_ONE = re.compile(r"^(?P<module>.+)\.(?P<expert>\d+)\.(?P<leaf>\w+)$", re.ASCII)


@dataclass(frozen=True)
class ExpertModule:
    """A module of an adapter that is over one or all experts of a stack.

    Attributes:
        stack: of the base.
        name: what patterns of the config are matched with.
        expert: which one; None for all.
        rows: the rows of the expert's matrix that it is over.
        side_by_side: its B holds the experts side by side for each rank, as PEFT's does; else one after another.
        is_linear: the module was a Linear over the matrix `[out, in]`, however the base holds it.
    """

    module: Module
    stack: Stack
    name: str
    expert: int | None
    rows: tuple[int, int]
    side_by_side: bool = True
    is_linear: bool = False

    @property
    def experts(self) -> Sequence[int]:
        """The experts that it is over."""
        return range(self.stack.experts) if self.expert is None else (self.expert,)


@dataclass
class Experts:
    """The modules of an adapter that are over stacks of experts.

    Attributes:
        found: by the module's name in the adapter.
        words: how they were found, for the screen; empty where there are none.
    """

    found: dict[str, ExpertModule] = field(default_factory=dict)
    words: str = ""

    def tell(self, context: Context) -> None:
        """Note how the modules were found, where there are some."""
        if self.found:
            context.note("info", "adapter-experts", f"{len(self.found)} modules are over {self.words}")


def find_experts(
    modules: Mapping[str, Module],
    tensors: Mapping[str, LazyTensor],
    architectures: Sequence[Architecture],
    raw: Mapping[str, Any],
    where: str,
) -> Experts:
    """The modules that are over stacks, where one class of the base has a stack for each of them.

    Args:
        tensors: of the base.
        architectures: classes that the adapter may have been trained on.
        raw: `adapter_config.json`.

    Raises:
        Refused: what is said by `_levels` and `_expect_whole`.
    """
    _expect_targets(modules, raw, where)
    owners = _owners(raw, tensors)
    asked = {n: m for n, m in modules.items() if _may_be(n, m, tensors, owners)}
    if not asked:
        return Experts()
    stored = {n: t.info for n, t in tensors.items()}
    # A router that is targeted as a parameter is a plain weight, under another name on disk than in memory.
    plain = {n: m for n, m in asked.items() if _may_be(n, m, tensors, ())}
    for wanted in (asked, plain) if plain and plain.keys() != asked.keys() else (asked,):
        for built in (*dict.fromkeys(architectures), None):
            find = _Finder(find_stacks(built, stored), built, raw, where, stored)
            found = find.all(wanted)
            if found is not None:
                find.expect_once(found, modules)
                expect_known_layout(raw, found.values(), where)
                name = built.name if built is not None else "names as in the base"
                kinds = "stacks" if any(e.expert is None for e in found.values()) else "one by one"
                return Experts(found, f"experts of {name}, {kinds}")
    return Experts()


def _expect_targets(modules: Collection[str], raw: Mapping[str, Any], where: str) -> None:
    """Refuse a config that targets parameters, of which the adapter holds none.

    Raises:
        Refused: `adapter-incomplete`.
    """
    targets = [t for t in raw.get("target_parameters") or () if isinstance(t, str)]
    bare = [f".{match['module']}" for name in modules if (match := _WRAPPED.match(name))]
    owners = [t.rpartition(".")[0] for t in targets]
    if targets and not any(n.endswith(f".{o}" if o else "") for o in owners for n in bare):
        what = f"adapter_config.json has target_parameters {fold(targets)}, and the adapter holds factors of none"
        raise Refused("adapter-incomplete", what, where=where)


def _owners(raw: Mapping[str, Any], stored: Collection[str]) -> set[str]:
    """Modules with a bare parameter that is targeted, by its name with the module's, or by its end alone."""
    targets = [t for t in raw.get("target_parameters") or () if isinstance(t, str)]
    named = {t.rpartition(".")[0] for t in targets}
    found = {n.rpartition(".")[0] for n in stored if targets and n.endswith(tuple(f".{t}" for t in targets))}
    return (named | found) - {""}


def _may_be(name: str, module: Module, stored: Collection[str], owners: Collection[str]) -> bool:
    """True for a module with factors that has no weight of its own in the base.

    Args:
        owners: modules whose bare parameters are targeted, such as the embeddings of a vision tower.
    """
    if not module.factors or f"{name}.weight" in stored:
        return False
    return ".experts" in f".{name}" or name.endswith(".base_layer") or any(f".{name}".endswith(f".{o}") for o in owners)


@dataclass
class _Finder:
    stacks: Mapping[str, Stack]
    built: Architecture | None
    raw: Mapping[str, Any]
    where: str
    stored: Collection[str] = ()

    def __post_init__(self) -> None:
        self.of_module: dict[str, list[Stack]] = {}
        order = {leaf: at for at, leaf in enumerate(parameter_order())}
        for stack in self.stacks.values():
            self.of_module.setdefault(stack.name.rpartition(".")[0], []).append(stack)
        for stacks in self.of_module.values():
            stacks.sort(key=lambda s: order.get(s.name.rpartition(".")[2], len(order)))

    def all(self, asked: Mapping[str, Module]) -> dict[str, ExpertModule] | None:
        """Every asked module with its stack; None where one has none."""
        found: dict[str, ExpertModule] = {}
        levels: dict[str, dict[int, str]] = {}
        for name, module in asked.items():
            match = _WRAPPED.match(name)
            assert match is not None
            bare = match["module"]
            if self._spelled(bare, self.of_module) is not None:
                levels.setdefault(bare, {})[match["levels"].count(".")] = name
                continue
            one = None if match["levels"] else self._one(bare, module)
            if one is None:
                return None
            found[name] = one
        for bare, names in levels.items():
            found |= self._levels(bare, names, asked)
        for each in found.values():
            self._expect_whole(each)
        return found

    def _spelled(self, name: str, known: Collection[str]) -> str | None:
        """The name with or without the backbone's prefix, as it is known."""
        prefix = f"{self.built.prefix}." if self.built is not None and self.built.prefix else ""
        other = name.removeprefix(prefix) if prefix and name.startswith(prefix) else prefix + name
        return next((n for n in (name, other) if n in known), None)

    def _one(self, name: str, module: Module) -> ExpertModule | None:
        """A module of one expert, or of a stack under the parameter's own name with factors of three dimensions."""
        stack = self._spelled(name, self.stacks)
        if stack is not None:
            is_stacked = all(len(t.info.shape) == 3 for t in module.factors.values())
            return self._of_stack(module, self.stacks[stack], name) if is_stacked else None
        place = one_of(f"{name}.weight", self.built)
        if place is not None:
            stack = self._spelled(place.stack, self.stacks)
            rows = None if stack is None else self.stacks[stack].rows.get(place.leaf)
            if stack is not None and rows is not None:
                return ExpertModule(module, self.stacks[stack], name, place.expert, rows, is_linear=True)
        match = _BY_NUMBER.match(name)
        if match is not None:
            stack = self._spelled(f"{match['module']}.{match['stack']}", self.stacks)
            if stack is not None:
                rows = (0, self.stacks[stack].matrix[0])
                return ExpertModule(module, self.stacks[stack], name, int(match["expert"]), rows, is_linear=True)
        return None

    def _of_stack(self, module: Module, stack: Stack, name: str) -> ExpertModule:
        return ExpertModule(module, stack, name, None, (0, stack.matrix[0]), is_linear=True)

    def _levels(self, bare: str, names: Mapping[int, str], asked: Mapping[str, Module]) -> dict[str, ExpertModule]:
        """The parameters that the nested wrappers of a module are of: the outermost is of the last declared.

        Raises:
            Refused: a level is missing, or they are not as many as the config targets (`adapter-incomplete`); the
                config does not say which parameters are meant (`adapter-ambiguous`).
        """
        module = self._spelled(bare, self.of_module)
        assert module is not None
        stacks = self.of_module[module]
        targets = self.raw.get("target_parameters")
        if isinstance(targets, list) and targets:
            stacks = [s for s in stacks if _is_targeted(f"{bare}.{s.name.rpartition('.')[2]}", targets)]
        else:
            stacks = [s for s in stacks if len(s.shape) == 3]
        count = len(names)
        if targets and count != len(stacks):
            self._expect_stacked(bare, module, targets)
        if sorted(names) != list(range(count)) or (targets and count != len(stacks)):
            wanted = fold([s.name.rpartition(".")[2] for s in stacks]) if stacks else "no parameter of it"
            raise Refused(
                "adapter-incomplete",
                f"{show(bare)} has factors on {count} levels, and the config targets {wanted}",
                where=self.where,
                expected="a level for each of target_parameters: lora_A, base_layer.lora_A, ...",
                got=fold(sorted(names.values())),
            )
        if count != len(stacks):
            raise Refused(
                "adapter-ambiguous",
                f"{show(bare)} has {len(stacks)} parameters and factors for {count}, and adapter_config.json has no "
                "target_parameters: which are meant is not recorded",
                where=self.where,
                next="set target_parameters in adapter_config.json to those that training used",
            )
        side_by_side = self.raw.get("lora_B_layout") != "grouped_by_expert"
        return {
            names[level]: ExpertModule(
                asked[names[level]],
                stack,
                f"{bare}.{stack.name.rpartition('.')[2]}",
                None,
                (0, stack.matrix[0]),
                side_by_side,
            )
            for level, stack in zip(range(count), reversed(stacks), strict=True)
        }

    def _expect_stacked(self, bare: str, module: str, targets: Sequence[Any]) -> None:
        """Refuse parameters that a load makes otherwise than by stacking.

        Raises:
            Refused: `adapter-fused`.
        """
        for name, operations in made_otherwise(self.built, self.stored).items():
            owner, _, leaf = name.rpartition(".")
            if owner == module and _is_targeted(f"{bare}.{leaf}", targets):
                what = f"LoRA on {show(name)}, which is rearranged on loading, is not implemented"
                next_step = "merge it with PEFT itself: PeftModel.from_pretrained(...).merge_and_unload()"
                got = f"made by {operations} on loading"
                raise Refused("adapter-fused", what, where=self.where, got=got, next=next_step)

    def _expect_whole(self, found: ExpertModule) -> None:
        """Refuse a stack of which the base has only a part, and an expert that it does not have.

        Raises:
            Refused: `base-experts`, `adapter-unmatched`.
        """
        stack = found.stack
        if stack.fault:
            raise Refused(
                "base-experts",
                f"the base's {show(stack.name)} is not whole: {stack.fault}",
                where=self.where,
                next="compare the base with its config: rlhf-convert doctor",
            )
        if found.expert is not None and found.expert >= stack.experts:
            raise Refused(
                "adapter-unmatched",
                f"{show(found.name)} is of expert {found.expert}, and {show(stack.name)} has {stack.experts}",
                where=self.where,
            )

    def _stack_of(self, name: str, module: Module) -> str | None:
        """The stack that a load makes of a module with factors."""
        place = one_of(f"{name}.weight", self.built) if module.factors else None
        return None if place is None else self._spelled(place.stack, self.stacks)

    def expect_once(self, found: Mapping[str, ExpertModule], modules: Mapping[str, Module]) -> None:
        """Refuse factors of all experts beside factors of one of them.

        Raises:
            Refused: `adapter-key-twice`.
        """
        stacked = {e.stack.name: n for n, e in found.items() if e.expert is None}
        for name, module in modules.items() if stacked else ():
            stack = found[name].stack.name if name in found else self._stack_of(name, module)
            other = stacked.get(stack or "")
            if other not in (None, name):
                raise Refused(
                    "adapter-key-twice",
                    f"{show(name)} and {show(other)} are both over {show(stack)}",
                    where=self.where,
                    got="factors of all experts and of one of them",
                )


def _is_targeted(name: str, targets: Sequence[Any]) -> bool:
    """As PEFT matches: the whole name, or its end after a dot."""
    return any(isinstance(t, str) and (name == t or name.endswith(f".{t}")) for t in targets)


def is_parameter(module: str, raw: Mapping[str, Any], built: Sequence[Architecture]) -> bool:
    """True for a weight that PEFT reaches as a bare parameter: it is targeted as one, or is an expert's."""
    targets = raw.get("target_parameters")
    if isinstance(targets, list) and _is_targeted(f"{module}.weight", targets):
        return True
    return _ONE.match(module) is not None and any(one_of(f"{module}.weight", b) is not None for b in built)


def expect_known_layout(raw: Mapping[str, Any], found: Iterator[ExpertModule] | Any, where: str) -> None:
    """Refuse stacked factors of which it isn't known whether experts are side by side in B or one after another.

    unsloth had them one after another until September 2026, under the same names and shapes; since then it says which.

    Raises:
        Refused: `adapter-expert-layout`.
    """
    layout = raw.get("lora_B_layout")
    if layout is not None and layout not in ("rank_major", "grouped_by_expert"):
        raise Refused(
            "adapter-expert-layout",
            "`lora_B_layout` of adapter_config.json is unknown",
            where=where,
            expected="rank_major or grouped_by_expert",
            got=show(layout),
            next="write there which of the two the adapter has; without the entry it is PEFT's own, rank_major",
        )
    stacked = any(e.expert is None and e.stack.experts > 1 and not e.is_linear for e in found)
    if layout is None and stacked and _is_of_unsloth(raw):
        raise Refused(
            "adapter-expert-layout",
            "the adapter is unsloth's, whose older versions laid the experts of lora_B out otherwise than PEFT under "
            "the same names, and adapter_config.json does not say which it is",
            where=where,
            expected="lora_B_layout in adapter_config.json",
            next="set lora_B_layout in adapter_config.json: grouped_by_expert for unsloth_zoo of before September "
            "2026, rank_major for a later one or for PEFT's own training",
        )


def _is_of_unsloth(raw: Mapping[str, Any]) -> bool:
    mapping = raw.get("auto_mapping")
    marked = isinstance(mapping, Mapping) and bool(mapping.get("unsloth_fixed"))
    return marked or str(raw.get("base_model_name_or_path") or "").lower().startswith("unsloth/")


def needs_pair(module: Module) -> bool:
    """True where a module has the factors of plain LoRA and nothing else."""
    return set(module.factors) == set(LORA_PAIR)
