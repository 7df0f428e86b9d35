"""Which of many cases the default run has: enough for every value to occur; the others are in the slow run."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any

import pytest

Axis = Mapping[str, Any] | Iterable[Any]
"""Values, or values by the words that stand for them in a test's name."""


def each_value(*axes: Axis) -> list[Any]:
    """The product of axes for `parametrize`: by default each value of each axis occurs, and the rest is slow."""
    named = [list(axis.items()) if isinstance(axis, Mapping) else [(str(v), v) for v in axis] for axis in axes]
    often = {tuple(number % len(axis) for axis in named) for number in range(max(map(len, named)))}
    found = []
    for at in itertools.product(*(range(len(axis)) for axis in named)):
        words, values = zip(*(axis[n] for axis, n in zip(named, at, strict=True)), strict=True)
        found.append(_case(values, "-".join(words), is_usual=at in often))
    return found


def each_facet(cases: Iterable[Any], *facets: Callable[[Any], Hashable], name: Callable[[Any], str] = str) -> list[Any]:
    """Cases for `parametrize`: by default those that show a value of a facet first, and the rest is slow.

    A case that is a tuple has the values of several arguments.
    """
    seen: set[tuple[int, Hashable]] = set()
    found = []
    for case in cases:
        shown = {(number, facet(case)) for number, facet in enumerate(facets)}
        found.append(_case(case if isinstance(case, tuple) else (case,), name(case), is_usual=not shown <= seen))
        seen |= shown
    return found


def one_in(count: int, cases: Iterable[Any], *, name: Callable[[Any], str] = str) -> list[Any]:
    """Cases of one kind for `parametrize`: by default the first of each `count`, and the rest is slow.

    Cases may be `pytest.param` already: what is slow stays slow and is not counted.
    """
    found: list[Any] = []
    usual = 0
    for case in cases:
        if not hasattr(case, "marks"):
            case = pytest.param(case, id=name(case))
        if case.marks:
            found.append(case)
            continue
        found.append(case if usual % count == 0 else pytest.param(*case.values, id=case.id, marks=pytest.mark.slow))
        usual += 1
    return found


def _case(values: tuple[Any, ...], name: str, *, is_usual: bool) -> Any:
    return pytest.param(*values, id=name, marks=() if is_usual else pytest.mark.slow)
