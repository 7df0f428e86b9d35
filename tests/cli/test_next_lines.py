"""What a refusal says to do next can be pasted whole: bash runs the commands and passes over what explains them."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from converter.cli import main
from converter.cli.lines import refusal
from converter.diagnostic import Command, Next, Steps
from converter.errors import Refused
from doctored import causal

__all__ = ["causal"]

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


def test_a_log_that_is_not_there_is_not_taken_for_a_message(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "./nosuch/../train.log"]) == 2
    assert "there is no file ./nosuch/../train.log" in capsys.readouterr().err


def test_a_log_without_a_known_message_is_said_to_have_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "train.log").write_text("step 1\n")
    assert main(["explain", str(tmp_path / "train.log")]) == 0
    assert capsys.readouterr().out.startswith("Nothing in it is a message that is known here.")


def test_an_output_that_can_not_be_written_is_answered_with_another_or_with_a_look_at_its_folder(
    causal: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["reshard", str(causal), str(causal / "inside")]) == 3
    assert capsys.readouterr().err.endswith(f"\n         rlhf-convert reshard {causal} {causal}-resharded\n")
    (tmp_path / "file").write_text("")
    assert main(["reshard", str(causal), str(tmp_path / "file" / "out")]) == 3
    said = capsys.readouterr().err
    assert said.endswith(f"# choose an output in a folder that you can write to\n         ls -ld {tmp_path}\n"), said


def test_a_folder_of_models_is_not_a_run_without_shards(
    causal: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(tmp_path), str(tmp_path / "out"), "--to", "trl", "--role", "reward"]) == 2
    said = capsys.readouterr().err
    assert "several-checkpoints" in said and str(causal) in said
