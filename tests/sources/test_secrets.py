"""No token in what is printed, wherever it came from and however it is written."""

from __future__ import annotations

import pytest

from converter.sources.hub.secrets import without_secrets, words_without_token

TOKEN = "hf_" + "aB3" * 10


def test_what_looks_like_a_token_is_stars_though_nobody_said_that_it_is_one() -> None:
    assert without_secrets(f"401 for Bearer {TOKEN}, and api_org_{'x' * 20}.") == "401 for Bearer ***, and ***."
    assert without_secrets("hf_short and model_hf_name") == "hf_short and model_hf_name"


def test_a_given_token_of_any_form_is_stars() -> None:
    assert without_secrets("key=correct-horse-battery!", "correct-horse-battery") == "key=***!"


def test_a_token_in_an_escaped_form_is_stars() -> None:
    secret = "geheim\n-wörter"
    shown = secret.encode("unicode_escape").decode("ascii")
    assert shown != secret
    assert without_secrets(f"header {shown} refused", secret) == "header *** refused"


def test_a_token_that_is_part_of_another_leaves_no_rest() -> None:
    assert without_secrets("abcdefgh-ijklmnop", "abcdefgh", "abcdefgh-ijklmnop") == "***"


def test_a_text_of_a_few_characters_is_not_taken_for_a_token() -> None:
    assert without_secrets("x is 7", "x") == "x is 7"


@pytest.mark.parametrize("name", ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"])
def test_a_token_of_the_environment_is_stars(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, " plain-old-secret\n")
    assert without_secrets("sent plain-old-secret away") == "sent *** away"


@pytest.mark.parametrize("words", [["--token", "plain-old-secret"], ["--token=plain-old-secret"]])
def test_a_token_of_the_command_line_is_stars_and_not_repeated(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["rlhf-convert", "push", *words, "a", "b"])
    assert without_secrets("push --token plain-old-secret") == "push --token ***"
    assert words_without_token(["push", *words, "a", "b"]) == ["push", "a", "b"]
