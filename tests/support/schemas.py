"""Outputs against shipped schemas, by the `jsonschema` package. A key that a schema does not name is a fault here."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from jsonschema import Draft202012Validator

from converter.cli.tell.schema import schema_of


def closed(schema: Any) -> Any:
    """The schema, with no room for keys that it does not name; a published schema leaves room for later ones."""
    if isinstance(schema, list):
        return [closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: closed(each) for key, each in schema.items()}
    if "properties" in found and found.get("type") == "object":
        found.setdefault("additionalProperties", False)
    return found


@functools.cache
def validator(name: str) -> Draft202012Validator:
    made = closed(schema_of(name))
    Draft202012Validator.check_schema(made)
    return Draft202012Validator(made)


def faults_of(name: str, value: Any) -> Iterator[str]:
    """What of an output is not as its schema says."""
    for error in validator(name).iter_errors(value):
        inner = sorted(error.context or [error], key=lambda e: -len(e.absolute_path))[:3]
        yield f"{name}: " + "; ".join(f"{list(e.absolute_path)} {e.message[:200]}" for e in inner)
