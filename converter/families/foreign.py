"""Prefixes that a user's own class put before a model's names: `llm.`, `net.`, `reward_model.backbone.`, any.

A prefix is not recognised by its words. It comes off if and only if what remains is the backbone that config.json
names, whole: nothing of it is missing, and nothing below the prefix is left over.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from converter.families.expected import Expected, Unknown, compare, expected

_MOST = 8
"""Prefixes that are tried: those that most names have."""


@dataclass(frozen=True)
class Foreign:
    """A prefix that is not the model's.

    Attributes:
        prefix: as it stands in the names, with its last dot.
        names: the model's names by the stored ones; names that the prefix does not stand before are their own.
    """

    prefix: str
    names: Mapping[str, str]


def foreign(names: Iterable[str], config: Mapping[str, Any]) -> Foreign | None:
    """The one prefix without which the names are those of the class in the config; None where there is none.

    None too where the names fit as they are, where two prefixes would do equally well, and for an unknown class. Names
    that only transformers' load forgives (`model.model.layers`), and no engine does, do not fit as they are.
    """
    stored = list(names)
    wanted = expected(config)
    if isinstance(wanted, Unknown) or not stored:
        return None
    is_theirs = any(n in wanted.saved or n in wanted.memory for n in stored)
    if is_theirs and _fits(stored, (), wanted, config):
        return None
    fitting = [f for f in _candidates(stored, wanted) if _fits(f.names.values(), _outside(f), wanted, config)]
    fewest = min((len(_outside(f)) for f in fitting), default=0)
    best = [f for f in fitting if len(_outside(f)) == fewest]
    return best[0] if len({tuple(f.names.values()) for f in best}) == 1 else None


def _outside(found: Foreign) -> frozenset[str]:
    return frozenset(n for n in found.names if not n.startswith(found.prefix))


def _candidates(stored: list[str], wanted: Expected) -> list[Foreign]:
    """Prefixes before names that the class has, with or without the backbone's own."""
    own = f"{wanted.prefix}." if wanted.prefix else ""
    known = {**dict.fromkeys(wanted.saved), **dict.fromkeys(wanted.memory)}
    bare = {n.removeprefix(own): n for n in known if own and n.startswith(own)}
    counts: Counter[str] = Counter()
    for name in stored:
        cut = name.find(".") + 1
        while cut:
            if name[cut:] in known or name[cut:] in bare:
                counts[name[:cut]] += 1
            cut = name.find(".", cut) + 1
    found = []
    for prefix, _ in counts.most_common(_MOST):
        rest = {n: n.removeprefix(prefix) for n in stored}
        inside = {n: r for n, r in rest.items() if n.startswith(prefix)}
        named = {n: r if r in known else bare.get(r, r) for n, r in inside.items()}
        names = {**rest, **named}
        if len(set(names.values())) == len(names) and any(n != r for n, r in names.items()):
            found.append(Foreign(prefix, names))
    return found


def _fits(names: Iterable[str], outside: Iterable[str], wanted: Expected, config: Mapping[str, Any]) -> bool:
    """True where the backbone is whole, and nothing but what stands outside of the prefix is left over."""
    difference = compare({name: wanted.saved.get(name, ()) for name in names}, wanted, config)
    lacking = [n for n in difference.missing if not wanted.is_outside(n)]
    return not lacking and not set(difference.unexpected) - set(outside)
