"""The language that a verb answers in."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated

import typer

from converter.cli.options import Display


class LanguageChoice(StrEnum):
    """In which language `explain` answers; Chinese stands above the English."""

    en = "en"
    zh = "zh"


@dataclass(frozen=True)
class Speaking(Display):
    """In which language a verb answers."""

    lang: Annotated[
        LanguageChoice | None,
        typer.Option("--lang", help="zh: one line in Chinese too; default: by the locale.", show_default=False),
    ] = None

    @property
    def in_chinese(self) -> bool:
        """Whether a line in Chinese is wanted, by `--lang` or else by the locale, and can be printed."""
        if self.lang is None:
            set_ones = (os.environ.get(name) for name in ("LC_ALL", "LC_MESSAGES", "LANG"))
            wanted = next(filter(None, set_ones), "").startswith("zh")
        else:
            wanted = self.lang is LanguageChoice.zh
        try:
            "中".encode(sys.stdout.encoding or "utf-8")
        except UnicodeEncodeError:
            return False
        return wanted
