"""Where output goes: data on stdout, everything else on stderr, nothing but JSON on stdout with `--json`."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from converter.errors import ConvertError
from converter.sources.hub.secrets import without_secrets

JSON_VERSION = 1
"""Version of every JSON object that is printed; raised when a key changes its meaning."""


@dataclass(frozen=True)
class Sink:
    """Prints what a verb has to say, as the user asked for it."""

    as_json: bool = False
    quiet: bool = False
    verbose: bool = False

    def data(self, text: str) -> None:
        """What was asked for, whatever the flags."""
        print(as_typed(text), flush=True)

    def screen(self, lines: Iterable[str]) -> None:
        """Lines of a report; not with `--json` or `-q`."""
        if not self.as_json and not self.quiet:
            for each in lines:
                print(as_typed(each), flush=True)

    def tell(self, text: str) -> None:
        """A line about the run itself, on stderr; not with `-q`."""
        if not self.quiet:
            print(as_typed(text), file=sys.stderr, flush=True)

    def json(self, value: Mapping[str, Any]) -> None:
        """One JSON object on stdout, with `--json` only."""
        if self.as_json:
            print(as_typed(json.dumps({"version": JSON_VERSION, **value}, indent=2, ensure_ascii=True)), flush=True)


def as_typed(text: str) -> str:
    """A text in which files that are read from the Hub are named as such, and not by the folder that stands for it.

    Nor is there a token in it.
    """
    from converter.core.files import sparse

    return without_secrets(sparse.as_typed(text))


class Failed(ConvertError):
    """The system did not let us: a full disk, a missing permission (exit code 3)."""

    exit_code = 3


def error_to_user(error: ConvertError, *, as_json: bool, writes: bool, one_line: bool = False) -> int:
    """Print an error as the user asked for it and return its exit code; JSON as one line for who reads lines."""
    if os.environ.get("RLHF_CONVERT_DEBUG") == "1":
        lines = "".join(traceback.format_exception(error.__cause__ or error))
        print(as_typed(lines), file=sys.stderr, flush=True)
    if as_json:
        told = {"version": JSON_VERSION, "error": error.to_json()}
        Sink().data(json.dumps(told, indent=None if one_line else 2))
        return error.exit_code
    from converter.cli.lines import refusal

    for each in refusal(error, writes=writes):
        print(as_typed(each), file=sys.stderr, flush=True)
    return error.exit_code
