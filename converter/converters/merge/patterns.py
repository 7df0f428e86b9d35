"""Patterns of adapter_config.json: which value they give a module, and which of them are safe to try."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

MAX_PATTERN_LENGTH = 400


def matching(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first pattern that a module's name matches, by PEFT's rule.

    A key is a regex that starts at the front or after a dot and matches to the end.

    Source: https://github.com/huggingface/peft/blob/v0.21.2/src/peft/utils/other.py (`get_pattern_key`)
    """
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def is_tame_regex(regex: str) -> bool:
    """True for a regex that compiles and can't take exponential time: no repeated group, no back-reference, few stars.

    The patterns come from an input file, and Python's matcher backtracks.
    """
    if len(regex) > MAX_PATTERN_LENGTH or re.search(r"\)[*+?{]|\(\?|\\[1-9]", regex):
        return False
    if len(re.findall(r"(?<!\\)[*+{]", regex)) > 3:
        return False
    try:
        re.compile(regex)
    except (re.error, OverflowError, RecursionError):
        return False
    return True
