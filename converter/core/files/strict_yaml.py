"""Recipe text to plain values, strictly: no tags, no aliases, no duplicate keys, bounded size and depth.

PyYAML's SafeLoader alone accepts alias bombs, lets the last of two equal keys win, reads `no` as false, `010` as eight
and `1:30` as ninety. Scalars here follow YAML 1.2's core schema instead, and each value remembers its line, for errors.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from converter.errors import UsageError
from converter.text import show

MAX_BYTES = 1_000_000
MAX_DEPTH = 32
MAX_EVENTS = 50_000
"""Values, keys, beginnings and ends. PyYAML takes seconds for more; the shipped recipes have less than a hundred."""

Path = tuple[str | int, ...]
"""Keys and indices from the top of a recipe to a value."""


@dataclass(frozen=True)
class RecipeText:
    """Values of a recipe and the line that each of them begins on (1 is the first)."""

    value: Any
    lines: dict[Path, int]

    def line(self, path: Path) -> int:
        """Line of the value at `path`, or of the nearest value around it."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path, 1)


class _StrictLoader(yaml.SafeLoader):
    """Composes nodes; resolves plain scalars by the core schema and keeps everything else text."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - PyYAML's own attribute


_NULL, _BOOL = "tag:yaml.org,2002:null", "tag:yaml.org,2002:bool"
_INT, _FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
_STR = "tag:yaml.org,2002:str"

# Source: YAML 1.2.2, section 10.3.2 (https://yaml.org/spec/1.2.2/#1032-tag-resolution), without octal, inf and nan.
_StrictLoader.add_implicit_resolver(_NULL, re.compile(r"(?:null|Null|NULL|~|)$"), ["n", "N", "~", ""])
_StrictLoader.add_implicit_resolver(_BOOL, re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_StrictLoader.add_implicit_resolver(_INT, re.compile(r"[-+]?[0-9]{1,18}$", re.ASCII), list("-+0123456789"))
_StrictLoader.add_implicit_resolver(
    _FLOAT,
    re.compile(r"[-+]?(?:\.[0-9]{1,40}|[0-9]{1,40}(?:\.[0-9]{0,40})?)(?:[eE][-+]?[0-9]{1,3})?$", re.ASCII),
    list("-+.0123456789"),
)


def read_values(text: bytes, *, file: str) -> RecipeText:
    """The values of one YAML document.

    Raises:
        UsageError: not one strict document; the message gives file and line (`recipe-syntax`).
    """
    if len(text) > MAX_BYTES:
        raise UsageError(
            "recipe-syntax", f"a recipe has at most {MAX_BYTES} bytes", where=file, got=f"{len(text)} bytes"
        )
    try:
        decoded = text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError("recipe-syntax", f"not UTF-8 at byte {error.start}", where=file) from None
    try:
        _check_events(decoded, file)
        node = yaml.compose(decoded, Loader=_StrictLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise _syntax(show(error.problem or "not YAML"), file, line) from None
    except yaml.YAMLError as error:
        raise UsageError("recipe-syntax", show(error), where=file) from None
    lines: dict[Path, int] = {}
    value = None if node is None else _value(node, (), lines, file)
    return RecipeText(value, lines)


def _check_events(text: str, file: str) -> None:
    """Refuses what composing would expand or recurse into, before anything is composed."""
    depth = documents = 0
    for count, event in enumerate(_events(text)):
        line = event.start_mark.line + 1
        if count > MAX_EVENTS:
            raise _syntax(f"it holds more than {MAX_EVENTS} values", file, line)
        if isinstance(event, yaml.AliasEvent):
            raise _syntax("aliases (*name) are not allowed", file, line)
        if isinstance(event, yaml.NodeEvent) and event.anchor is not None:
            raise _syntax("anchors (&name) are not allowed", file, line)
        if getattr(event, "tag", None) is not None:
            raise _syntax(f"tags are not allowed: {show(event.tag)}", file, line)
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                raise _syntax(f"nested deeper than {MAX_DEPTH}", file, line)
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        elif isinstance(event, yaml.DocumentStartEvent):
            documents += 1
            if documents > 1:
                raise _syntax("a recipe is one document", file, line)


def _events(text: str) -> Iterator[Any]:
    yield from yaml.parse(text, Loader=_StrictLoader)


def _value(node: yaml.Node, path: Path, lines: dict[Path, int], file: str) -> Any:
    line = node.start_mark.line + 1
    lines[path] = line
    if isinstance(node, yaml.MappingNode):
        return _mapping(node, path, lines, file)
    if isinstance(node, yaml.SequenceNode):
        return [_value(item, (*path, index), lines, file) for index, item in enumerate(node.value)]
    text = str(node.value)
    if node.tag == _NULL:
        return None
    if node.tag == _BOOL:
        return text.lower() == "true"
    if node.tag == _INT:
        return int(text)
    if node.tag == _FLOAT:
        return float(text)
    return text


def _mapping(node: yaml.MappingNode, path: Path, lines: dict[Path, int], file: str) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != _STR:
            raise _syntax("a key must be text", file, line)
        key = str(key_node.value)
        if key in out:
            raise _syntax(f"the key `{show(key)}` appears twice, first on line {lines[(*path, key)]}", file, line)
        out[key] = _value(value_node, (*path, key), lines, file)
        lines[(*path, key)] = line
    return out


def _syntax(what: str, file: str, line: int) -> UsageError:
    return UsageError("recipe-syntax", what, where=f"{file}:{line}")
