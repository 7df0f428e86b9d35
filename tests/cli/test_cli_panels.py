"""Options in `--help` stand in panels: the verb's own first, those that every verb has last."""

from __future__ import annotations

import re

import pytest

from converter.cli import VERBS
from oracle.command import run

PANELS = ["Input", "Output", "Resources", "Hub", "Consent"]
WRITING = ("convert", "rm-to-critic", "critic-to-rm", "merge-lora", "gather", "repair", "reshard", "run")
SHARED = {
    "Output": ["--out", "--dry-run", "--print-recipe", "--dtype", "--max-shard-size", "--layout", "--link-unchanged"],
    "Resources": ["--jobs", "--memory"],
    "Hub": ["--revision", "--token", "--push-to-hub", "--public"],
    "Consent": ["--allow-name", "--overwrite", "--allow", "--keep-code"],
}


def panels(verb: str) -> dict[str, list[str]]:
    """Each section of a verb's help, with the long names of the options that it lists, in order."""
    text = run(verb, "--help").out
    found: dict[str, list[str]] = {}
    for title, body in re.findall(r"^([A-Z]\w+):\n((?:  .*\n|\n(?=  ))*)", text, re.MULTILINE):
        found[title] = re.findall(r"^  (?:-\w, )?(--[\w-]+)", body, re.MULTILINE)
    return found


@pytest.mark.parametrize("verb", VERBS)
def test_panels_come_in_one_order_with_the_verbs_own_options_before_them(verb: str) -> None:
    titles = [title for title in panels(verb) if title not in ("Arguments", "Examples")]
    known = ["Options", *PANELS]
    assert titles == [title for title in known if title in titles]
    assert "Output" in titles


@pytest.mark.parametrize("verb", VERBS)
def test_the_options_of_every_verb_are_the_last_of_their_panel(verb: str) -> None:
    assert panels(verb)["Output"][-4:] == ["--json", "--verbose", "--quiet", "--help"]


@pytest.mark.parametrize("verb", WRITING)
def test_a_verb_that_writes_has_the_shared_options_at_the_end_of_their_panels(verb: str) -> None:
    found = panels(verb)
    for title, options in SHARED.items():
        listed = [option for option in found[title] if option in options]
        assert listed == options, title
    assert not {o for options in SHARED.values() for o in options} & {*found.get("Options", [])}
