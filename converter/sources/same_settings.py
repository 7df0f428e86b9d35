"""Settings that all ranks of a run have alike: of an optimizer's groups, of a schedule. Others are of another save."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from converter.text import show

_NOT_SHARED = ("params", "name")
"""Numbers of parameters, and names that may count ranks."""


def other_setting(by_rank: Mapping[int, Any]) -> str | None:
    """Where a rank's settings differ from those of the first, in words; None where they don't, or aren't settings.

    Args:
        by_rank: a dictionary or a list of them, by rank; only numbers, texts and lists of these in it are compared.
    """
    first, *others = by_rank
    own = _listed(by_rank[first])
    for rank in others:
        for number, (mine, its) in enumerate(zip(own, _listed(by_rank[rank]), strict=False)):
            for key in [k for k in mine if k in its and k not in _NOT_SHARED and _differ(mine[k], its[k])][:1]:
                where = f" of group {number}" if len(own) > 1 else ""
                one, other = show(mine[key]), show(its[key])
                return f"{show(key)}{where} is {one} on rank {first}, and {other} on rank {rank}"
    return None


def _listed(value: Any) -> list[Mapping[Any, Any]]:
    return [each for each in (value if isinstance(value, list) else [value]) if isinstance(each, dict)]


def _differ(a: Any, b: Any) -> bool:
    return _is_plain(a) and _is_plain(b) and repr(a) != repr(b)


def _is_plain(value: Any) -> bool:
    return isinstance(value, int | float | str) or (isinstance(value, list | tuple) and all(map(_is_plain, value)))
