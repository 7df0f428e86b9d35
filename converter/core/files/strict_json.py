"""JSON from strangers: no duplicate keys, bounded size and depth, UTF-8; errors name the file."""

from __future__ import annotations

import json
import re
from itertools import accumulate
from pathlib import Path
from typing import Any, NoReturn

from converter.core.files.opening import read_limited
from converter.errors import Refused
from converter.text import show

MAX_JSON_BYTES = 64_000_000
MAX_DEPTH = 64
MAX_VALUES = 4_000_000
"""Commas, objects and arrays in one text: what bounds the memory that it takes. The largest tokenizer.json known to us
(Gemma 3) has 1.9 million."""

# One that does not end goes on to the end of the text: else each quote in it would be tried as its beginning.
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)
_STEP = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


def load_json(path: Path, *, limit: int = MAX_JSON_BYTES, root: Path | None = None, allow_nan: bool = False) -> Any:
    """The value in a JSON file.

    Raises:
        Refused: see `parse_json`, and `converter.core.files.opening.open_input`.
    """
    return parse_json(read_limited(path, limit=limit, root=root), where=str(path), allow_nan=allow_nan)


def parse_json(raw: bytes, *, where: str, allow_nan: bool = False, most: int = MAX_VALUES) -> Any:
    """The value of JSON text.

    Args:
        allow_nan: accept `NaN` and `Infinity`, which are not JSON; Python's json writes them, and so some configs
            (Mamba's `time_step_limit`) have them.
        most: commas, objects and arrays that it may hold.

    Raises:
        Refused: not JSON or not UTF-8, a key twice in one object, deeper than 64 levels, more values than `most`, a
            number with more than 4300 digits (`json-malformed`).
    """
    if raw.startswith(b"\xef\xbb\xbf"):
        raise _bad(where, "it begins with a byte order mark; save it as plain UTF-8")
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise _bad(where, "it is UTF-16, by its byte order mark; save it as plain UTF-8")
    if not raw.strip(b"\0"):
        raise _bad(where, "the file is empty" if not raw else "the file holds zeros only: a copy that never finished")
    # Two quotes for a key and two for its value; looked at first, since taking strings out takes memory for each.
    if raw.count(b'"') > 4 * most:
        raise _bad(where, f"it holds more than {most} values")
    bare = _STRING.sub(b"", raw)
    if sum(map(bare.count, (b",", b"[", b"{"))) > most:
        raise _bad(where, f"it holds more than {most} values")
    if is_deeper(bare, MAX_DEPTH):
        raise _bad(where, f"it is nested deeper than {MAX_DEPTH} levels")
    try:
        return json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=lambda pairs: _unique(pairs, where),
            parse_constant=None if allow_nan else lambda text: _refuse_constant(text, where),
        )
    except UnicodeDecodeError as error:
        raise _bad(where, f"it is not UTF-8 (byte {error.start})") from error
    except RecursionError as error:
        raise _bad(where, "it is nested too deeply") from error
    except ValueError as error:
        raise _bad(where, show(error)) from error


def is_deeper(raw: bytes, limit: int) -> bool:
    """True where objects and arrays are nested deeper than `limit`; told without parsing, so without recursion."""
    brackets = _STRING.sub(b"", raw).translate(None, _NOT_BRACKETS)
    return any(depth > limit for depth in accumulate(map(_STEP.__getitem__, brackets)))


def _unique(pairs: list[tuple[str, Any]], where: str) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(k for k, _ in pairs if k in seen or seen.add(k))  # type: ignore[func-returns-value]
        raise _bad(where, f"the key `{show(twice)}` appears twice")
    return found


def _refuse_constant(text: str, where: str) -> NoReturn:
    raise _bad(where, f"{show(text)} is no JSON number")


def _bad(where: str, why: str) -> Refused:
    return Refused("json-malformed", f"the JSON can't be trusted: {why}", where=show(where), facts={"why": why})
