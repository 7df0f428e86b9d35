"""Preference pairs as people keep them: lines of JSON, one JSON list, or Parquet.

A pair has `chosen` and `rejected`, and most have `prompt`. Each is a text or a list of chat messages. Without a prompt,
lists of messages begin with what they share, and texts are scored as they are (RewardBench, UltraFeedback, hh-rlhf and
TRL's explicit and implicit prompts are all read so).
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converter.errors import UsageError
from converter.sources.hub.data_sets import PREFIX, file_of, is_data_set
from converter.text import show

EXPECTED = '{"prompt": ..., "chosen": "...", "rejected": "..."}'
Messages = list[dict[str, Any]]
_COLUMNS = ("prompt", "chosen", "rejected", "subset", "text", "messages", "completion")
"""Columns of a Parquet file that are read."""


@dataclass(frozen=True)
class Pair:
    """One comparison.

    Attributes:
        prompt: a text, or chat messages; None where each side is a whole text.
        subset: the part of a benchmark that it belongs to, as RewardBench names them; empty where there are none.
    """

    prompt: str | Messages | None
    chosen: str
    rejected: str
    subset: str = ""


@dataclass(frozen=True)
class Pairs:
    """The first pairs of a file, and how many it has."""

    pairs: tuple[Pair, ...]
    total: int


def read_pairs(source: str, most: int) -> Pairs:
    """The first pairs of a file, or of a data set on the Hub.

    Raises:
        UsageError: there is no such file (`path-missing`), one entry is not a pair (`probe-line`), there are none
            (`probe-empty`), or it is Parquet and pyarrow is not installed (`probe-parquet`); the data
            set has several files (`probe-which`).
        Refused: the Hub does not give it (`hub-download`).
    """
    path = found_file(source)
    pairs: list[Pair] = []
    total = 0
    for place, value in rows_of(path):
        total += 1
        if total <= most:
            pairs.append(pair_of(value, path, place))
    if not pairs:
        raise UsageError("probe-empty", "there are no pairs", where=show(path))
    return Pairs(tuple(pairs), total)


def found_file(source: str) -> Path:
    """The file of a path, or of a data set on the Hub.

    Raises:
        UsageError: there is no such file (`path-missing`), or the data set has several (`probe-which`).
        Refused: the Hub does not give it (`hub-download`).
    """
    path = file_of(source) if is_data_set(source) else Path(source).expanduser()
    if not path.is_file():
        what = "there is no such file of pairs"
        raise UsageError(
            "path-missing",
            what,
            where=show(path),
            next=f"name the file, or a data set as {PREFIX}allenai/reward-bench",
        )
    return path


def rows_of(path: Path) -> Iterator[tuple[str, Any]]:
    """Each entry and where it stands."""
    with path.open("rb") as file:
        begin = file.read(4)
    if begin == b"PAR1":
        yield from _parquet(path)
    elif begin.lstrip()[:1] == b"[":
        yield from _list(path)
    else:
        yield from _lines(path)


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, text in enumerate(file, 1):
            if text.strip():
                place = f"line {number}"
                try:
                    yield place, json.loads(text)
                except (ValueError, RecursionError):
                    raise _not_a_pair(path, place) from None


def _list(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        found = json.loads(path.read_text("utf-8", errors="replace"))
    except (ValueError, RecursionError):
        raise _not_a_pair(path, "the list") from None
    yield from ((f"entry {number}", each) for number, each in enumerate(found, 1))


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow.parquet as parquet
        from pyarrow.lib import ArrowException
    except ImportError:
        what = "a Parquet file is read with pyarrow, which is not installed"
        raise UsageError(
            "probe-parquet", what, where=show(path), next="pip install 'rlhf-convert[parquet]', or write JSON lines"
        ) from None
    try:
        with parquet.ParquetFile(path) as file:
            columns = [n for n in _COLUMNS if n in file.schema_arrow.names]
            batches = file.iter_batches(batch_size=256, columns=columns)
            rows = itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
            yield from ((f"row {number}", each) for number, each in enumerate(rows, 1))
    except (ArrowException, OSError) as error:
        raise UsageError("probe-line", f"the Parquet file can't be read: {show(error)}", where=show(path)) from None


def pair_of(value: Any, path: Path, place: str) -> Pair:
    """An entry as a pair.

    Raises:
        UsageError: it is not one (`probe-line`).
    """
    try:
        chosen, rejected = value["chosen"], value["rejected"]
        subset = value["subset"] if isinstance(value.get("subset"), str) else ""
        if value.get("prompt") is not None:
            return Pair(_prompt(value["prompt"]), _answer(chosen), _answer(rejected), subset)
        if isinstance(chosen, str):
            return Pair(None, chosen, _text(rejected), subset)
        both = zip(messages_of(chosen), messages_of(rejected), strict=False)
        shared = [a for a, _ in itertools.takewhile(lambda two: two[0] == two[1], both)]
        if len(shared) != len(chosen) - 1 or len(shared) != len(rejected) - 1:
            raise TypeError
        return Pair(shared, _answer(chosen), _answer(rejected), subset)
    except (KeyError, TypeError, AttributeError, IndexError):
        raise _not_a_pair(path, place) from None


def _prompt(value: Any) -> str | Messages:
    return value if isinstance(value, str) else messages_of(value)


def messages_of(value: Any) -> Messages:
    """Chat messages, their roles and contents alone.

    Raises:
        TypeError: they are something else.
    """
    if not isinstance(value, list) or not value:
        raise TypeError
    return [{"role": _text(each["role"]), "content": _text(each["content"])} for each in value]


def _answer(value: Any) -> str:
    """An answer's text; a list of messages ends with it."""
    return _text(value[-1]["content"] if isinstance(value, list) else value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _not_a_pair(path: Path, place: str) -> UsageError:
    return UsageError("probe-line", "not a pair", where=f"{show(path)}, {place}", expected=EXPECTED)
