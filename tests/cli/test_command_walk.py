"""Every command that any verb prints of a broken folder is typed into a shell there, and leads on.

`python tests/support/command_walk.py` prints the whole walk, with the number of commands that were typed.
"""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from command_walk import Walk, faults, walk
from served_shell import Shell
from walk_inputs import BREAKAGES, VERBS, Places

SHORT = {
    "shard-missing": ("doctor", "reshard", "convert-actor", "verify"),
    "weights-missing": ("merge", "convert-base", "push"),
    "index-conflict": ("diff", "verify-against", "inspect"),
    "labels-mismatch": ("critic", "run-reshard"),
    "adapter-half": ("merge-base", "run-merge", "gather-adapter"),
    "head-base-lost": ("convert-reward", "rm"),
    "zero-rank-missing": ("gather", "convert-reward"),
    "verl-rank-missing": ("gather-merged",),
    "zero-latest": ("verify",),
    "several-parts": ("gather",),
}
"""Folders and verbs of the run that always is made: one of each kind of refusal."""


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Places:
    return Places(tmp_path_factory.mktemp("walk"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("key", SHORT)
def test_what_is_printed_of_a_broken_folder_leads_on(key: str, shell: Shell, places: Places) -> None:
    assert [w for verb in SHORT[key] for w in walk(shell, places.broken(key), verb).wrong] == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("key", BREAKAGES)
def test_what_any_verb_prints_of_any_broken_folder_leads_on(key: str, shell: Shell, places: Places) -> None:
    assert [w for verb in VERBS for w in walk(shell, places.broken(key), verb).wrong] == []


@pytest.mark.parametrize(
    ("typed", "command"),
    [
        ("merge-lora nowhere out", "ls ."),
        ("merge-lora ./a/b/c out", "ls ."),
        ("reshard whole out --memory lots", "rlhf-convert reshard --help"),
        ("reshard whole out --dtype float3", "rlhf-convert reshard --help"),
        ("merge-lora", "rlhf-convert merge-lora --help"),
        ("verify whole --python p", "rlhf-convert verify --help"),
        ("run no-such-recipe out", "rlhf-convert list"),
    ],
)
def test_an_error_about_words_ends_with_a_command_too(typed: str, command: str, shell: Shell, places: Places) -> None:
    folder = places.root / "sound"
    done = shell.type(f"rlhf-convert {typed}", folder)
    assert done.code in (2, 3)
    assert f"Next:    {command}\n" in done.err or f" {command}\n" in done.err or done.err.rstrip().endswith(command)
    assert shell.type(command, folder).code == 0


def test_the_users_own_output_stands_where_one_has_to_be_chosen(shell: Shell, places: Places) -> None:
    place = places.broken("weight-sets")
    done = shell.type("rlhf-convert convert './my rm'\"'\"'s' './the out' --to trl --role actor", place.folder)
    (said,) = done.said
    (command,) = said.commands
    assert shlex.split(command)[:2] == ["rlhf-convert", "repair"]
    assert shlex.split(command)[3] == "./the out"


@pytest.mark.parametrize(
    ("command", "fault"),
    [
        ("rlhf-convert convert a b --base base --base other", "gives --base twice"),
        ("rlhf-convert verify a [--for X]", "has a part that is to be left out or filled in"),
        ("rlhf-convert gather run/iter_5/optimizer out", "names an optimizer's folder"),
        ("rlhf-convert repair a b --allow x --allow y", None),
        ("rlhf-convert gather a OUT", "has a blank: OUT"),
        ("rlhf-convert merge-lora a b --base BASE", "has a blank: BASE"),
    ],
)
def test_the_walk_sees_what_no_command_may_have(command: str, fault: str | None) -> None:
    assert list(faults(command)) == ([] if fault is None else [fault])


def test_the_walk_sees_a_loop_and_a_refusal_without_a_command(tmp_path: Path) -> None:
    """With a program that answers as a broken version of ours would."""
    with Shell(program=LOOPING) as shell:
        found = Walk(shell, tmp_path)
        found.go("rlhf-convert round a")
        found.go("rlhf-convert mute a")
    assert [w.partition(": ")[2].split()[0] for w in found.wrong] == ["leads", "mute"]


LOOPING = r"""#!/bin/bash
refuse() {
  printf '{"code": "%s", "text": "t", "where": null, "severity": "error", "exit": 3, ' "$1" >> "$SAID"
  printf '"steps": [%s]}\n' "$2" >> "$SAID"
  echo "Next: $3" >&2
  exit 3
}
case $1 in
  round) refuse one '{"text": "rlhf-convert again a", "command": ["a"]}' "rlhf-convert again a";;
  again) refuse two '{"text": "rlhf-convert round a", "command": ["a"]}' "rlhf-convert round a";;
  mute) refuse mute '' '';;
esac
"""
