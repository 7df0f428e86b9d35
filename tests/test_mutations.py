"""The list of mutations is up to date: each still applies to the code, is of Python, and names tests that exist.

That a named test fails is shown by `tools/mutate.py`, which takes minutes.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from mutate import ROOT, Mutation, mutations
from source_trees import functions

LIST = mutations()
ROOMS = {"core", "dialects", "families", "sources", "converters", "examine", "publish", "recipe", "cli"}


def test_there_are_many_over_all_rooms_and_each_has_a_name_of_its_own() -> None:
    assert len(LIST) >= 40
    assert {m.file.split("/")[1] for m in LIST} >= ROOMS
    assert len({m.name for m in LIST}) == len(LIST)


@pytest.mark.parametrize("mutation", LIST, ids=lambda m: m.name)
def test_a_mutation_applies_and_names_tests_that_exist(mutation: Mutation) -> None:
    text = (ROOT / mutation.file).read_text(encoding="utf-8")
    changed = mutation.applied(text)
    assert changed != text
    ast.parse(changed)
    lines = [set(t.splitlines()) for t in (text, changed)]
    assert len(lines[0] - lines[1]) <= 2
    assert mutation.tests
    for test in mutation.tests:
        file, _, name = test.partition("::")
        assert Path(ROOT, file).is_file(), test
        if name:
            assert name.partition("[")[0] in {f.name for f in functions(ROOT / file)}, test


def test_a_text_that_is_not_there_once_is_told() -> None:
    twice = Mutation("twice", "x.py", "a", "b", ("tests/x.py",))
    with pytest.raises(ValueError, match="2 times in x"):
        twice.applied("a a")
    with pytest.raises(ValueError, match="0 times"):
        twice.applied("c")
