"""Names of a full model without what wrappers and saves put before or into them, to a fixpoint.

What compilers and data-parallel wrappers add is known by its words. Any other prefix (`model.` twice, PEFT's
`base_model.model.` around a model without LoRA) is taken off where the config's class proves the rest to be a name, or
where every name has it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from converter.families.implied import implied
from converter.families.words import BEFORE, INSIDE, OUTER_WRAPPERS, PEFT_PREFIX

_LEAD = re.compile("|".join(f"^{re.escape(lead)}" for lead in (*(f"{w}." for w in OUTER_WRAPPERS), PEFT_PREFIX)))
_TWICE = re.compile(r"^((?:\w+\.)+?)\1")
_OF_ENCODERS = ("encoder.", "decoder.")


@dataclass(frozen=True)
class Plain:
    """Plain names by the names that are stored, and what was taken off, for screens."""

    names: Mapping[str, str]
    taken: tuple[str, ...]

    @property
    def changed(self) -> tuple[str, ...]:
        """Stored names that are not plain."""
        return tuple(raw for raw, name in self.names.items() if raw != name)

    @property
    def twice(self) -> dict[str, list[str]]:
        """Plain names that several tensors would have, with their stored names."""
        homes: dict[str, list[str]] = {}
        for raw, name in self.names.items():
            homes.setdefault(name, []).append(raw)
        return {name: raws for name, raws in homes.items() if len(raws) > 1}


def plain_names(names: Iterable[str], config: Mapping[str, Any]) -> Plain:
    """Every name without wrappers and without prefixes that are not its own."""
    found = {name: INSIDE.sub("", name) for name in names}
    taken = dict.fromkeys(m[0] for name in found for m in INSIDE.finditer(name))
    for raw, name in found.items():
        if outer := BEFORE.match(name):
            taken |= dict.fromkeys(f"{part}." for part in outer[0].split(".") if part)
            found[raw] = name[outer.end() :]
    wanted = implied(config)
    known = frozenset() if wanted is None else frozenset((*wanted.shapes, *wanted.optional))
    if known & set(found.values()) or any(_proved(n, known) for n in found.values()):
        for raw, name in found.items():
            if (own := _proved(name, known)) is not None:
                taken[name.removesuffix(own)] = None
                found[raw] = own
    else:
        found, more = _common(found)
        taken |= dict.fromkeys(more)
    return Plain(found, tuple(taken))


def _proved(name: str, known: frozenset[str]) -> str | None:
    """The name behind prefixes, where it is one of the class's and the whole is not."""
    if name in known:
        return None
    rest = name
    while lead := _lead(rest, known):
        rest = rest.removeprefix(lead)
        if rest in known:
            return rest
    return None


def _lead(name: str, known: frozenset[str]) -> str:
    """What may stand before a name: `model.` only of classes that have it, since bare backbones load with it too."""
    if (match := _LEAD.match(name)) is not None:
        return match[0]
    if (twice := _TWICE.match(name)) is not None:
        return twice[1]
    return "model." if name.startswith("model.") and "model.embed_tokens.weight" in known else ""


def _common(found: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """Without a table: a prefix that all names have, and nearly all of them twice; PEFT's, where all have it."""
    names, taken = dict(found), []
    while names:
        values = list(names.values())
        if all(n.startswith(PEFT_PREFIX) for n in values) and not any(".lora_" in n for n in values):
            prefix = PEFT_PREFIX
        else:
            doubled = [m[1] for n in values if (m := _TWICE.match(n)) and m[1] not in _OF_ENCODERS]
            nearly_all = len(doubled) >= len(values) - 2 and 2 * len(doubled) > len(values)
            prefix = doubled[0] if nearly_all else ""
        if not prefix:
            break
        taken.append(prefix)
        if all(n.startswith(prefix) for n in values):
            names = {raw: n.removeprefix(prefix) for raw, n in names.items()}
        else:
            names = {raw: n.removeprefix(prefix) if n.startswith(prefix * 2) else n for raw, n in names.items()}
    return names, taken
