"""Every message of the table: a text as it is pasted, with a traceback around it, leads to its code and to advice.

The tests are made from the table itself, so that a message without a text of its own fails here.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from converter.cli import main
from converter.diagnostic import Command, commands
from converter.examine.explanations.log import MESSAGES, Seen, read
from converter.examine.explanations.message import Message
from converter.shipped import shipped
from printed_messages import PRINTED

BY_CODE = {message.code: message for message in MESSAGES}
FRAMES = """\
Traceback (most recent call last):
  File "/home/u/train.py", line 12, in <module>
    main()
  File "/opt/venv/lib/python3.11/site-packages/acme/trainer.py", line 90, in main
    model = load(path)
"""
CONSEQUENCES = {"worker-failed", "worker-ended", "collective-timeout", "crash-below-python", "traceback-unknown"}
"""Reports of an end, whose cause stands elsewhere."""

ADVICE = {"delete-shards", "mismatched-sizes-ignored", "strict-false"}
"""Texts that people recommend to each other, which no package prints."""

NOT_OF_A_PACKAGE = {
    *("out-of-memory", "disk-full", "push-too-large"),  # of kernels, shells and servers
    *("header-incomplete", "zip-damaged", "probabilities-not-finite"),  # of compiled code
    *("embedding-key-error", "unmerged-keys", "adapter-key-error", "rank-file-missing"),  # Python's own of a lookup
    *("size-zero", "tensor-sizes-differ", "vision-names", "tokenizer-class", "format-missing"),
    *("verl-config-missing", "dcp-key-invalid", "adapter-config-beside-model", "score-unsupported"),  # of old versions
    *("tensor-not-mapped", "dschat-checkpoint", "zero-to-fp32-folder"),  # of scripts
}
"""Messages for which no line of a package's Python can be named, and why."""


def found(text: str) -> list[Seen]:
    return [seen for seen, is_new in read([text.encode()]) if is_new]


def test_every_message_has_a_text_and_every_text_a_message() -> None:
    assert PRINTED.keys() == BY_CODE.keys()
    assert len(PRINTED) >= 60


@pytest.mark.parametrize("code", PRINTED)
def test_its_text_is_known_alone_behind_a_prefix_and_in_a_log(code: str) -> None:
    text = PRINTED[code]
    for around in (text, f"[rank0]: {text}\r\n", f"step 1\n{text}\nstep 2\n"):
        if code == "run-interrupted" or (around.startswith("[rank0]") and code == "out-of-memory"):
            continue
        assert [seen.message.code for seen in found(around)] == [code], around
    (seen,) = found(f"step 1\n{text}\nstep 2\n")
    assert seen.line == 2


@pytest.mark.parametrize("code", [c for c in PRINTED if BY_CODE[c].severity == "error" and c not in CONSEQUENCES])
def test_a_traceback_that_ends_in_an_error_is_explained_by_it_alone(code: str) -> None:
    text = PRINTED[code].strip()
    raised = text if re.match(r"[\w.]+(?:Error|Exception)\b", text) else f"RuntimeError: {text}"
    codes = [seen.message.code for seen in found(FRAMES + raised + "\n")]
    assert "traceback-unknown" not in codes
    assert codes


@pytest.mark.parametrize("code", [c for c in PRINTED if BY_CODE[c].severity == "cosmetic"])
def test_a_harmless_line_beside_an_unknown_traceback_does_not_explain_it(code: str) -> None:
    codes = [seen.message.code for seen in found(f"{PRINTED[code]}\n{FRAMES}acme.WidgetError: upside down\n")]
    assert sorted(codes) == sorted([code, "traceback-unknown"])


def test_every_message_that_a_package_prints_says_where() -> None:
    unplaced = {m.code for m in MESSAGES if not m.seen_in} - ADVICE - {"traceback-unknown"}
    assert unplaced == NOT_OF_A_PACKAGE


def _filled(command: Command, folder: str) -> Command:
    """A command of the table with what a reader puts in for its capital words."""
    base = str(shipped("fixtures") / "tiny-qwen2-base")
    words = {
        "BASE": base,
        "FULL_PRECISION_BASE": base,
        "ALPHA_OF_TRAINING": "8",
        "RANKS": "2",
        "N": "8",
        "OUT": f"{folder}-out",
        "TRAINER": "trl",
    }
    capital = re.compile(r"[A-Z][A-Z_0-9]*(?:/\S*)?")
    return Command(
        command.verb,
        tuple(words.get(w, folder) if capital.fullmatch(w) else w for w in command.arguments),
        command.program,
    )


def _shapes() -> dict[str, tuple[Message, Command]]:
    """Each command that the table advises, once for its verb and options."""
    shapes: dict[str, tuple[Message, Command]] = {}
    for message in MESSAGES:
        for command in commands(message.next):
            shapes.setdefault(" ".join(command.words), (message, command))
    return {key: value for key, value in shapes.items() if value[1].program == "rlhf-convert"}


def test_every_command_that_is_advised_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On a sound adapter: it does what it says or is refused for what that folder is, never for its words."""
    folder = tmp_path / "it"
    shutil.copytree(shipped("fixtures") / "tiny-reward-adapter", folder)
    wrong = []
    for key, (message, command) in _shapes().items():
        code = main(list(_filled(command, str(folder)).words[1:]))
        told = capsys.readouterr().err
        shutil.rmtree(f"{folder}-out", ignore_errors=True)
        if code not in (0, 1, 2, 3, 4) or "usage" in told.split("\n")[0]:
            wrong.append((message.code, key, code, told[:200]))
    assert not wrong, wrong


@pytest.mark.parametrize("code", [m.code for m in MESSAGES if m.severity != "cosmetic"])
def test_what_is_wrong_comes_with_something_to_do(code: str) -> None:
    assert BY_CODE[code].steps
