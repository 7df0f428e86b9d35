"""`rlhf-convert schema`: what a verb prints with `--json`, as a JSON schema.

A definition stands once, in `cli/schemas/`; a verb's schema is a choice between the definitions that it may print, with
everything that those refer to.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converter.cli.sink import JSON_VERSION
from converter.errors import UsageError
from converter.text import show

if TYPE_CHECKING:
    from converter.cli.options import Display

DIALECT = "https://json-schema.org/draft/2020-12/schema"

_WRITTEN = ("written", "written_two", "written_to_hub", "planned", "planned_two", "printed_recipe")
_MODEL = ("written", "written_to_hub", "planned", "printed_recipe")

PRINTED: Mapping[str, tuple[str, ...]] = {
    "convert": _WRITTEN,
    "rm-to-critic": _WRITTEN,
    "critic-to-rm": _WRITTEN,
    "merge-lora": _MODEL,
    "gather": _WRITTEN,
    "repair": (*_WRITTEN, "sound"),
    "reshard": (*_MODEL, "written_state", "planned_state"),
    "run": (*_WRITTEN, "written_share"),
    "average": _MODEL,
    "interpolate": _MODEL,
    "make-delta": _MODEL,
    "apply-delta": _MODEL,
    "extract-lora": _MODEL,
    "prune-lora": _MODEL,
    "convert-lora": _MODEL,
    "inspect": ("inspect",),
    "doctor": ("doctor",),
    "verify": ("verify",),
    "explain": ("explained_code", "explained_log", "known_codes"),
    "diff": ("diff",),
    "demo": ("demo",),
    "list": ("list",),
    "env": ("env",),
    "watch": ("watch",),
    "check": ("check",),
    "push": ("push",),
}
"""Definitions that each verb may print, but for `error`, which every verb may."""

RECEIPT = "receipt"


def schema(name: str | None, options: Display) -> int:
    """Print a schema, or the names."""
    if name is None:
        options.sink.screen((*PRINTED, RECEIPT))
        options.sink.json({"schemas": [*PRINTED, RECEIPT]})
        return 0
    options.sink.data(json.dumps(schema_of(name), indent=2))
    return 0


def schema_of(name: str) -> dict[str, Any]:
    """The schema of a verb's output, or of a receipt, complete in itself.

    Raises:
        UsageError: no verb of this name prints JSON (`usage`).
    """
    if name != RECEIPT and name not in PRINTED:
        raise UsageError("usage", f"no schema is named {show(name)}", expected=", ".join((*PRINTED, RECEIPT)))
    known = _definitions()
    roots = (RECEIPT,) if name == RECEIPT else (*PRINTED[name], "error")
    needed = _reached(roots, known)
    title = "rlhf-convert.json" if name == RECEIPT else f"rlhf-convert {name} --json"
    return {
        "$schema": DIALECT,
        "$id": f"urn:rlhf-convert:schema:{name}:{JSON_VERSION}",
        "title": title,
        "anyOf": [{"$ref": f"#/$defs/{root}"} for root in roots],
        "$defs": {each: known[each] for each in sorted(needed)},
    }


def _definitions() -> dict[str, Any]:
    """Every definition, by name."""
    found: dict[str, Any] = {}
    for file in sorted((Path(__file__).parents[1] / "schemas").glob("*.json")):
        found |= json.loads(file.read_text("utf-8"))
    return found


def _reached(roots: tuple[str, ...], known: Mapping[str, Any]) -> set[str]:
    """The definitions that these refer to, and those that those refer to."""
    found: set[str] = set()
    todo = list(roots)
    while todo:
        each = todo.pop()
        if each not in found:
            found.add(each)
            todo += re.findall(r'"#/\$defs/(\w+)"', json.dumps(known[each]))
    return found
