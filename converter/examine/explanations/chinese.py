"""One line in Chinese for each code and each message that `explain` knows; a plug-in's diagnosis has none."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from functools import cache
from importlib import resources


@cache
def _lines(file: str) -> Mapping[str, str]:
    text = resources.files("converter.examine.explanations").joinpath("zh", f"{file}.toml").read_text("utf-8")
    return tomllib.loads(text)


def of_code(code: str) -> str | None:
    """What a code means, in the order in which `explain CODE` looks: diagnoses, other codes, messages."""
    files = ("diagnoses", "checks", "converting", "merging", "messages")
    return next((_lines(file)[code] for file in files if code in _lines(file)), None)


def of_message(code: str) -> str | None:
    """What a message of a trainer's means."""
    return _lines("messages").get(code)
