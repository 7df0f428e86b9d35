"""Names of a trainer's tensors: wrappers taken off, and which part of a PEFT model each of them is."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache

from converter.errors import Refused
from converter.families.factors import alternatives, factor_names
from converter.families.words import INSIDE, LORA_MAGNITUDE, OUTER_WRAPPERS, PEFT_PREFIX
from converter.text import fold, show

_OUTER = tuple(f"{word}." for word in OUTER_WRAPPERS)


@cache
def _part() -> re.Pattern[str]:
    return re.compile(
        rf"^(?P<module>.+?)\.(?P<kind>{alternatives()}|token_adapter\.trainable_tokens_delta|modules_to_save)"
        r"\.(?P<adapter>[^.]+)(?:\.(?P<leaf>.+))?$"
    )


def without_wrappers(names: Iterable[str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Names without what compilers and data-parallel wrappers put into them, and what that was.

    An outer wrapper is one only where every name begins with it.

    Raises:
        Refused: two names become one (`rename-collision`).
    """
    found = {name: INSIDE.sub("", name) for name in names}
    taken = {m[0] for name in found for m in INSIDE.finditer(name)}
    while found:
        outer = next((o for o in _OUTER if all(n.startswith(o) for n in found.values())), None)
        if outer is None:
            break
        taken.add(outer)
        found = {raw: n.removeprefix(outer) for raw, n in found.items()}
    if len(set(found.values())) != len(found):
        twice = sorted({n for n in found.values() if list(found.values()).count(n) > 1})
        raise Refused("rename-collision", f"without their wrappers two tensors are {fold(twice)}")
    return found, tuple(sorted(taken))


@dataclass(frozen=True)
class Factor:
    """A tensor that LoRA trained: `module` as in memory, `kind` (`lora_A`, ..., `modules_to_save`) and the rest."""

    raw: str
    module: str
    kind: str
    leaf: str | None

    @property
    def key(self) -> str:
        """The name that PEFT saves it under."""
        if self.kind == "modules_to_save":
            return f"{PEFT_PREFIX}{self.module}.{self.leaf}"
        # PEFT saves a magnitude without `.weight`, and loads it so.
        leaf = "" if self.leaf is None or self.kind == LORA_MAGNITUDE else f".{self.leaf}"
        return f"{PEFT_PREFIX}{self.module}.{self.kind}{leaf}"


@dataclass
class PeftNames:
    """Tensors of a model wrapped by PEFT.

    Attributes:
        factors: what the adapter is made of.
        base: names of the base model's tensors, as transformers would save them, mapped to the trainer's.
        copies: untrained copies of modules that were trained whole.
    """

    factors: list[Factor] = field(default_factory=list)
    base: dict[str, str] = field(default_factory=dict)
    copies: list[str] = field(default_factory=list)

    @property
    def targets(self) -> list[str]:
        """Modules that LoRA changes, in order."""
        return list(dict.fromkeys(f.module for f in self.factors if f.kind in factor_names()))


def has_factors(names: Collection[str]) -> bool:
    """True where LoRA was trained."""
    return any((m := _part().match(n)) is not None and m["kind"] in factor_names() for n in names)


def peft_names(names: Mapping[str, str], where: str) -> PeftNames:
    """Sort a trainer's tensors (names without wrappers by raw name) into an adapter's and the base model's.

    Raises:
        Refused: several adapters were trained at once (`several-adapters`), names that aren't PEFT's (`adapter-names`).
    """
    prefixes = {n.partition(PEFT_PREFIX)[0] for n in names.values() if PEFT_PREFIX in n}
    if len(prefixes) != 1:
        raise Refused("adapter-names", f"LoRA's names do not have PEFT's `{PEFT_PREFIX}` in one place", where=where)
    start = f"{prefixes.pop()}{PEFT_PREFIX}"
    outside = [n for n in names.values() if not n.startswith(start)]
    if outside:
        text = f"{len(outside)} tensors are outside of the model that PEFT wraps: {fold(outside)}"
        raise Refused("adapter-names", text, where=where)
    found = PeftNames()
    adapters: dict[str, None] = {}
    for raw, full in names.items():
        name = full.removeprefix(start)
        match = _part().match(name)
        if match is not None:
            adapters[match["adapter"]] = None
            found.factors.append(Factor(raw, match["module"], match["kind"], match["leaf"]))
        elif ".original_module." in f".{name}":
            found.copies.append(raw)
        else:
            plain = name.replace(".token_adapter.base_layer.", ".").replace(".base_layer.", ".")
            found.base[plain] = raw
    if len(adapters) > 1:
        listed = ", ".join(show(a) for a in adapters)
        raise Refused(
            "several-adapters", f"the run trained several adapters ({listed}); one can be gathered", where=where
        )
    return found
