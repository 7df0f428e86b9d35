"""Names that PEFT methods give their tensors: the union of what every registered method declares.

Whoever has to tell an adapter's tensors from a model's asks here; a method that is added is known everywhere at once.
What the shipped methods declare is kept beside this module (`methods.json`, which `tools/write_tables.py` writes), so
that asking for names imports none of them. A method that the file does not have is imported and asked.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from converter.plugins import METHODS, Point, load, named

KEPT = Path(__file__).with_name("methods.json")
"""What the shipped methods declare, by the values of their entry points."""

_TEXTS = ("peft_type", "switch")
_TUPLES = ("factors", "shared", "pairs", "zeros")


@dataclass(frozen=True)
class Declared:
    """What one registered method says of itself, without its code; the fields are those of `Method`."""

    point: Point
    peft_type: str
    switch: str
    factors: tuple[str, ...]
    shared: tuple[str, ...] = ()
    pairs: tuple[tuple[str, str], ...] = ()
    zeros: tuple[str, ...] = ()


@cache
def declared() -> tuple[Declared, ...]:
    """Every registered method in the order of their names, those that can't be imported left out."""
    kept: Mapping[str, Mapping[str, Any]] = json.loads(KEPT.read_text(encoding="utf-8"))
    found = []
    for _, points in sorted(named(METHODS).items()):
        told = kept.get(points[0].value)
        if told is None:
            method = load(points[0])
            if isinstance(method, Exception):
                continue
            told = declaration(method)
        pairs = tuple((str(pair[0]), str(pair[1])) for pair in told["pairs"])
        names = {key: tuple(map(str, told[key])) for key in ("factors", "shared", "zeros")}
        found.append(Declared(points[0], told["peft_type"], told["switch"], pairs=pairs, **names))
    return tuple(found)


def declaration(method: object) -> dict[str, Any]:
    """What a method declares, as it is kept."""
    texts = {key: str(getattr(method, key, "")) for key in _TEXTS}
    return {**texts, **{key: list(getattr(method, key, ())) for key in _TUPLES}}


@cache
def factor_names() -> tuple[str, ...]:
    """`lora_A`, `lora_B` and every other tensor that a method keeps for a module, each once."""
    return tuple(dict.fromkeys(name for method in declared() for name in method.factors))


@cache
def shared_names() -> tuple[str, ...]:
    """Tensors that a method keeps once for the whole model, `base_model.NAME`."""
    return tuple(dict.fromkeys(name for method in declared() for name in method.shared))


@cache
def factor_pairs() -> tuple[tuple[str, str], ...]:
    """Factors that mean something only together, such as `lora_A` and `lora_B`."""
    return tuple(dict.fromkeys(pair for method in declared() for pair in method.pairs))


@cache
def zero_factors() -> tuple[str, ...]:
    """Factors that begin as zeros: an adapter in which all of them still are changes nothing."""
    return tuple(dict.fromkeys(name for method in declared() for name in method.zeros))


@cache
def factor_in_name() -> re.Pattern[str]:
    """What finds a factor in an adapter's key: groups `module` and `kind`."""
    return re.compile(rf"^(?P<module>.+?)\.(?P<kind>{alternatives()})(?:\.|$)")


@cache
def alternatives() -> str:
    """The names as a regular expression's alternatives, longer ones first."""
    return "|".join(re.escape(name) for name in sorted(factor_names(), key=len, reverse=True)) or r"(?!)"
