"""Which method an adapter's config asks for, of those registered."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from converter.converters.merge.methods.fields import Field
from converter.converters.merge.methods.method import Method
from converter.errors import Refused
from converter.families.factors import declared
from converter.plugins import load
from converter.text import fold, show

NOT_MERGEABLE = {
    "ADAMSS": "its subspaces come from clusters of the base's singular directions, which no file holds",
    "ADAPTION_PROMPT": "it adds prompts inside attention",
    "CARTRIDGE": "it is a trained key-value cache",
    "CPT": "it is a trained prompt",
    "FROD": "what it trains belongs to a decomposition of all bases together, which no file holds",
    "LILY": "its update depends on the input",
    "MULTITASK_PROMPT_TUNING": "it is a trained prompt",
    "POLY": "it mixes adapters by task at run time",
    "PREFIX_TUNING": "it is a trained prompt",
    "PROMPT_TUNING": "it is a trained prompt",
    "P_TUNING": "it is a trained prompt",
    "SHADOW": "its update depends on the input",
    "XLORA": "it mixes adapters by input at run time",
}
"""PEFT's types without a merge, each with the reason."""


def methods() -> tuple[Method, ...]:
    """Every registered method, ours and strangers'."""
    kinds = dict.fromkeys(d.peft_type for d in declared())
    return tuple(m for kind in kinds for m in _of_type(kind))


@cache
def _of_type(kind: str) -> tuple[Method, ...]:
    """The registered methods of a `peft_type`; no other is imported."""
    found = (load(d.point) for d in declared() if d.peft_type == kind)
    return tuple(m for m in found if isinstance(m, Method))


def find_method(config: Mapping[str, Any], where: str) -> Method:
    """The method of `peft_type`: the variant whose switch is set, else the plain one.

    Raises:
        Refused: no registered method has the type (`peft-type-unsupported`), it has no merged form
            (`peft-type-unmergeable`), or two variants are switched on at once (`adapter-field-unsupported`).
    """
    kind = str(config.get("peft_type") or "")
    found = _of_type(kind)
    switched = [m for m in found if m.switch and config.get(m.switch)]
    if len(switched) > 1:
        listed = " and ".join(f"`{m.switch}`" for m in switched)
        raise Refused("adapter-field-unsupported", f"{listed} are set: together they are not implemented", where=where)
    for method in switched or [m for m in found if not m.switch]:
        return method
    reason = NOT_MERGEABLE.get(kind)
    if reason is not None:
        inner = config.get("adapters")
        held = [show(path) for path in inner.values()] if isinstance(inner, Mapping) else []
        what = f"{kind} can't be merged into weights: {reason}"
        step = f"merge one of the adapters inside of it: {fold(held)}" if held else None
        raise Refused("peft-type-unmergeable", what, where=where, next=step)
    read = fold(sorted({d.peft_type for d in declared()}))
    raise Refused(
        "peft-type-unsupported",
        f"PEFT type {show(kind) or 'missing'} is not supported; read are {read}",
        where=where,
        next="merge it with PEFT itself: PeftModel.from_pretrained(...).merge_and_unload()",
    )


def switches(method: Method) -> dict[str, Field]:
    """Fields that would have made another variant of the method's type: they are off, and checked all the same."""
    others = [m for m in _of_type(method.peft_type) if m.switch and m.switch != method.switch]
    return {m.switch: m.all_fields[m.switch] for m in others}


def variant_of(factor: str, method: Method) -> Method | None:
    """The variant of the method's type that has a factor which the method itself does not have."""
    same = [m for m in _of_type(method.peft_type) if factor in m.factors]
    return None if factor in method.factors else next(iter(same), None)
