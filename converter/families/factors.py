"""Names that PEFT methods give their tensors: the union of what every registered method declares.

Whoever has to tell an adapter's tensors from a model's asks here; a method that is added is known everywhere at once.
"""

from __future__ import annotations

import re
from functools import cache

from converter.plugins import METHODS, loaded


def _declared(attribute: str) -> list[tuple[object, ...]]:
    return [tuple(getattr(method, attribute, ())) for method in loaded(METHODS)]


@cache
def factor_names() -> tuple[str, ...]:
    """`lora_A`, `lora_B` and every other tensor that a method keeps for a module, each once."""
    return tuple(dict.fromkeys(str(name) for names in _declared("factors") for name in names))


@cache
def shared_names() -> tuple[str, ...]:
    """Tensors that a method keeps once for the whole model, `base_model.NAME`."""
    return tuple(dict.fromkeys(str(name) for names in _declared("shared") for name in names))


@cache
def factor_pairs() -> tuple[tuple[str, str], ...]:
    """Factors that mean something only together, such as `lora_A` and `lora_B`."""
    pairs = [pair for pairs in _declared("pairs") for pair in pairs]
    return tuple(dict.fromkeys((str(p[0]), str(p[1])) for p in pairs if isinstance(p, tuple) and len(p) == 2))


@cache
def zero_factors() -> tuple[str, ...]:
    """Factors that begin as zeros: an adapter in which all of them still are changes nothing."""
    return tuple(dict.fromkeys(str(name) for names in _declared("zeros") for name in names))


@cache
def factor_in_name() -> re.Pattern[str]:
    """What finds a factor in an adapter's key: groups `module` and `kind`."""
    return re.compile(rf"^(?P<module>.+?)\.(?P<kind>{alternatives()})(?:\.|$)")


def alternatives() -> str:
    """The names as a regular expression's alternatives, longer ones first."""
    return "|".join(re.escape(name) for name in sorted(factor_names(), key=len, reverse=True)) or r"(?!)"
