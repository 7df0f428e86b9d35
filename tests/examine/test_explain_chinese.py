"""`explain` has one line in Chinese for everything that it knows, and prints it where it is wanted."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from converter.examine.doctor import diagnoses
from converter.examine.explanations import chinese
from converter.examine.explanations.log import MESSAGES
from converter.recipe.verbs.explain import explained, known_codes
from oracle.command import run

HAN = re.compile(r"[\u4e00-\u9fff]")
ERROR = "size mismatch for score.weight: copying a param with shape torch.Size([0]) from checkpoint"


@pytest.fixture(autouse=True)
def no_locale(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LC_ALL", "LC_MESSAGES", "LANG"):
        monkeypatch.delenv(name, raising=False)


def is_a_sentence(line: str | None) -> bool:
    """Names of files, flags and classes stay as they are; the sentence around them is Chinese."""
    return line is not None and len(HAN.findall(line)) >= 8 and line.endswith("。") and "\n" not in line


def test_every_code_has_one_line_in_chinese() -> None:
    lines = {code: chinese.of_code(code) for code in known_codes()}
    missing = [code for code, line in lines.items() if not is_a_sentence(line)]
    assert missing == [], "write a line for each in converter/examine/explanations/zh"
    assert [code for code, line in lines.items() if line in (explained(code) or ())] == []


def test_every_message_has_one_line_in_chinese_of_its_own() -> None:
    assert [m.code for m in MESSAGES if not is_a_sentence(chinese.of_message(m.code))] == []


def test_no_two_codes_have_the_same_line() -> None:
    lines = [chinese.of_code(code) for code in known_codes() if not code.endswith(("-report", "-note"))]
    assert len(lines) == len({*lines})


def test_a_code_that_is_a_diagnosis_and_a_message_has_a_line_for_each() -> None:
    both = {m.code for m in MESSAGES} & {*diagnoses()}
    assert both >= {"remote-code-missing", "format-missing", "labels-mismatch"}
    assert all(chinese.of_code(code) != chinese.of_message(code) for code in both)


def test_lang_zh_prints_the_line_above_the_english() -> None:
    english = run("explain", "head-missing").out.splitlines()
    both = run("explain", "head-missing", "--lang", "zh").out.splitlines()
    assert both == [english[0], chinese.of_code("head-missing"), *english[1:]]


def test_a_pasted_error_and_a_log_are_answered_in_chinese_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.log").write_text(f"step 1\n{ERROR}\n")
    line = chinese.of_message("size-mismatch-empty-file")
    assert f"\n  {line}\n" in run("explain", ERROR, "--lang", "zh").out
    assert f"\n  {line}\n" in run("explain", "train.log", "--lang", "zh").out
    assert not HAN.search(run("explain", "train.log").out)


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        ({"LANG": "zh_CN.UTF-8"}, True),
        ({"LC_MESSAGES": "zh_TW.UTF-8", "LANG": "en_US.UTF-8"}, True),
        ({"LC_ALL": "en_US.UTF-8", "LANG": "zh_CN.UTF-8"}, False),
        ({"LC_ALL": "", "LANG": "zh_CN.UTF-8"}, True),
        ({"LANG": "C.UTF-8"}, False),
    ],
)
def test_the_locale_decides_where_no_flag_does(
    environment: dict[str, str], wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert bool(HAN.search(run("explain", "head-missing").out)) == wanted
    assert not HAN.search(run("explain", "head-missing", "--lang", "en").out)


def test_json_has_both_languages_whatever_the_locale() -> None:
    found = json.loads(run("explain", "head-missing", "--json").out)
    assert {"code", "text", "next", "zh"} <= {*found}
    assert HAN.search(found["zh"])
    (message,) = json.loads(run("explain", ERROR, "--json").out)["messages"]
    assert HAN.search(message["zh"])
    assert not HAN.search(message["text"])
