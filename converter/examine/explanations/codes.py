"""What the codes of refusals, checks and notes mean, and what to do; those of diagnoses are explained by doctor."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from functools import cache
from importlib import resources

from converter.diagnostic import Diagnostic


@cache
def codes() -> Mapping[str, Diagnostic]:
    """Every code that is explained here, in the package's TOML files: what happened, and what to do about it."""
    found: dict[str, Diagnostic] = {}
    for file in resources.files("converter.examine.explanations").iterdir():
        if file.name.endswith(".toml"):
            for code, fields in tomllib.loads(file.read_text("utf-8")).items():
                found[code] = Diagnostic(code=code, severity="info", text=fields["means"], next=fields.get("do"))
    return found
