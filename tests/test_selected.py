"""The default run's share of a product has every value of every axis, and the slow run has all the rest."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from selected import each_facet, each_value, one_in


def usual(cases: list[Any]) -> list[Any]:
    return [c.values for c in cases if not c.marks]


@pytest.mark.parametrize("axes", [("abc", "xy"), ("ab", "vwxyz"), ("abc", "xyz", "12"), ("a", "x"), ("abcdefg", "xy")])
def test_every_value_of_every_axis_is_usual_and_nothing_of_the_product_is_lost(axes: tuple[str, ...]) -> None:
    cases = each_value(*axes)
    assert [c.values for c in cases] == list(itertools.product(*axes))
    assert [{c[n] for c in usual(cases)} for n in range(len(axes))] == [set(axis) for axis in axes]
    assert len(usual(cases)) == max(map(len, axes))
    assert {c.id for c in cases} == {"-".join(values) for values in itertools.product(*axes)}


def test_a_case_of_several_arguments_is_told_by_any_of_them() -> None:
    cases = each_facet([("a", 1), ("a", 2), ("b", 2)], lambda c: c[0], name=lambda c: c[0])
    assert usual(cases) == [("a", 1), ("b", 2)]


def test_words_stand_for_values_in_a_tests_name() -> None:
    assert [(c.id, c.values) for c in each_value("a", {"untied": False})] == [("a-untied", ("a", False))]


def test_a_case_is_usual_that_shows_what_none_before_it_showed() -> None:
    cases = each_facet(["a1", "a2", "b1", "b2"], lambda c: c[0], lambda c: c[1])
    assert usual(cases) == [("a1",), ("a2",), ("b1",)]
    assert [c.id for c in cases] == ["a1", "a2", "b1", "b2"]
    assert cases[-1].marks[0].name == "slow"


def test_of_cases_of_one_kind_some_are_usual_and_what_was_slow_is_not_counted() -> None:
    slow = pytest.param("s", id="s", marks=pytest.mark.slow)
    cases = one_in(2, ["a", slow, "b", "c", "d"])
    assert usual(cases) == [("a",), ("c",)]
    assert [c.id for c in cases] == ["a", "s", "b", "c", "d"]
    assert [c.marks[0].name for c in cases if c.marks] == ["slow"] * 3
