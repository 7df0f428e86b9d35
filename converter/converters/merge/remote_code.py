"""A base whose model is Python code in its folder: without that code what is written does not load."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from converter.core.checkpoint import Checkpoint
from converter.core.context import Context
from converter.text import fold


def tell_of_code(base: Checkpoint, context: Context) -> None:
    """Name the base's code that stays behind, and the option that takes it along."""
    left = code_files(base.config) - base.side_files.keys()
    if left:
        text = (
            f"config.json names {fold(sorted(left))}, which is code and stays behind: what is written does not load "
            "without it. Read it, and give --keep-code to take it along"
        )
        context.note("changes-numbers", "code-left-behind", text)


def code_files(config: Mapping[str, Any]) -> frozenset[str]:
    """The Python files beside a config that its `auto_map` names; those of another repository are not among them."""
    table = config.get("auto_map")
    named: set[str] = set()
    for value in table.values() if isinstance(table, Mapping) else ():
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, str) and "--" not in each and each.count(".") == 1:
                named.add(f"{each.split('.')[0]}.py")
    return frozenset(named)
