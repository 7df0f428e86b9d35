"""JSON from strangers: no duplicate keys, bounded size and depth, UTF-8; errors name the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from converter.errors import Refused, show
from converter.files import read_limited

MAX_JSON_BYTES = 64_000_000


def load_json(path: Path, *, limit: int = MAX_JSON_BYTES, root: Path | None = None) -> Any:
    """The value in a JSON file.

    Raises:
        Refused: see `parse_json`, and `converter.files.open_input`.
    """
    return parse_json(read_limited(path, limit=limit, root=root), where=str(path))


def parse_json(raw: bytes, *, where: str) -> Any:
    """The value of JSON text.

    Raises:
        Refused: not JSON or not UTF-8, a key twice in one object, nested deeper than the interpreter's stack,
            a number with more than 4300 digits (`json-malformed`).
    """
    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=lambda pairs: _unique(pairs, where))
    except UnicodeDecodeError as error:
        raise _bad(where, f"it is not UTF-8 (byte {error.start})") from error
    except RecursionError as error:
        raise _bad(where, "it is nested too deeply") from error
    except ValueError as error:
        raise _bad(where, show(error)) from error


def _unique(pairs: list[tuple[str, Any]], where: str) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(k for k, _ in pairs if k in seen or seen.add(k))  # type: ignore[func-returns-value]
        raise _bad(where, f"the key `{show(twice)}` appears twice")
    return found


def _bad(where: str, why: str) -> Refused:
    return Refused("json-malformed", f"the JSON can't be trusted: {why}", where=show(where))
