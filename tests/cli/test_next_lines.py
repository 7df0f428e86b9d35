"""What a refusal says to do next can be pasted whole: bash runs the commands and passes over what explains them."""

from __future__ import annotations

import subprocess

import pytest

from converter.cli.lines import refusal
from converter.diagnostic import Command, Next, Steps
from converter.errors import Refused

LOOK = Command("doctor", ("it's",), program="echo")
THEN = Command("repair", ("a b",), program="echo")


@pytest.mark.parametrize(
    ("step", "shown", "said"),
    [
        (LOOK, ["Next:    echo doctor 'it'\"'\"'s'"], ["doctor it's"]),
        (Steps(LOOK, " shows all; or wait"), ["Next:    echo doctor 'it'\"'\"'s'", "         # shows all; or wait"],
         ["doctor it's"]),
        (Steps("wait; for a fresh one, ", THEN, ", or --seed 0"),
         ["Next:    # wait; for a fresh one", "         echo repair 'a b'", "         # or --seed 0"], ["repair a b"]),
        (Steps(LOOK, ", then ", THEN), ["Next:    echo doctor 'it'\"'\"'s'", "         echo repair 'a b'"],
         ["doctor it's", "repair a b"]),
        (Steps(LOOK, THEN), ["Next:    echo doctor 'it'\"'\"'s' && echo repair 'a b'"], ["doctor it's", "repair a b"]),
    ],
)  # fmt: skip
def test_every_line_behind_next_is_a_command_or_a_comment(step: Next, shown: list[str], said: list[str]) -> None:
    lines = refusal(Refused("no-shards", "there are none", next=step))[2:]
    assert lines == shown
    typed = "\n".join(line.removeprefix("Next:") for line in lines)
    done = subprocess.run(["bash", "-c", typed], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == said


def test_a_sentence_alone_is_no_comment() -> None:
    assert refusal(Refused("no-shards", "there are none", next="copy it again"))[2:] == ["Next:    copy it again"]
