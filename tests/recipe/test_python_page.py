"""`docs/python.md` tells the truth: its examples are run in order, and print what the page shows."""

from __future__ import annotations

import doctest
import re
import warnings
from pathlib import Path

import converter
from fake_hub import FakeHub, running
from hub_here import client_of
from places import REPOSITORY
from screens import workplace

PAGE = (REPOSITORY / "docs" / "python.md").read_text("utf-8")
NOT_VERBS = {"to_torch", "make_plan", "load_recipe", "adam_moments"}


def test_the_examples_of_the_page_do_what_it_shows(tmp_path: Path) -> None:
    said: list[str] = []
    parsed = doctest.DocTestParser().get_doctest(re.sub(r"^```.*$", "", PAGE, flags=re.MULTILINE), {}, "page", None, 0)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    (tmp_path / "home").mkdir()
    (tmp_path / "work").mkdir()
    with (
        running(FakeHub()) as hub,
        client_of(hub, tmp_path / "home"),
        workplace(tmp_path / "work"),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", "Use 'content=", DeprecationWarning)  # the client's, about itself
        found = runner.run(parsed, out=said.append)
    assert found.attempted > 50
    assert found.failed == 0, "".join(said)


def test_every_example_is_run_and_every_function_has_one() -> None:
    assert PAGE.count("```") == 2 * PAGE.count("```pycon\n")
    functions = [n for n in converter.__all__ if n.islower() and callable(getattr(converter, n))]
    lacking = [
        n for n in functions if f"converter.{n}(" not in "".join(re.findall(r"```pycon\n(.*?)```", PAGE, re.DOTALL))
    ]
    assert set(lacking) <= NOT_VERBS
