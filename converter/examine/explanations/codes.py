"""What the codes of refusals, checks and notes mean, and what to do; those of diagnoses are explained by doctor."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources


@dataclass(frozen=True)
class Explained:
    """A code as `explain` prints it.

    Attributes:
        means: what happened, in one to three sentences.
        do: the next command or advice; empty where there is nothing to do.
    """

    means: str
    do: str = ""


@cache
def codes() -> Mapping[str, Explained]:
    """Every code that is explained here, in the package's TOML files."""
    found: dict[str, Explained] = {}
    for file in resources.files("converter.examine.explanations").iterdir():
        if file.name.endswith(".toml"):
            found |= {code: Explained(**fields) for code, fields in tomllib.loads(file.read_text("utf-8")).items()}
    return found
