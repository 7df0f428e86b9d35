"""What models are asked in a comparison: preference pairs as `verify --probe` reads them, or texts.

A text is a line of a `.txt` file, or an entry with `text`, with `messages`, or with `prompt` and `completion`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converter.errors import UsageError
from converter.examine.verify.pairs_file import Messages, found_file, messages_of, pair_of, rows_of
from converter.text import show

EXPECTED = '{"prompt": ..., "chosen": "...", "rejected": "..."}, {"text": "..."} or {"messages": [...]}'


@dataclass(frozen=True)
class Asked:
    """The first texts of a file, each with its prompt.

    Attributes:
        texts: of pairs the chosen and the rejected answer in turn.
        is_pairs: they are pairs.
        total: entries that the file has.
    """

    texts: tuple[tuple[str | Messages | None, str], ...]
    is_pairs: bool
    total: int

    @property
    def words(self) -> str:
        """`200 pairs`, or how many of a file's texts."""
        count = len(self.texts) // (2 if self.is_pairs else 1)
        kind = ("pair" if self.is_pairs else "text") + ("s" if count != 1 else "")
        return f"{count} {kind}" if count == self.total else f"the first {count} of {self.total} {kind}"


def read_asked(source: str, most: int) -> Asked:
    """The first entries of a file, or of a data set on the Hub.

    Raises:
        UsageError: there is no such file (`path-missing`), an entry is neither a pair nor a text (`probe-line`), there
            are none (`probe-empty`), or it is Parquet and pyarrow is not installed (`probe-parquet`).
        Refused: the Hub does not give it (`hub-download`).
    """
    path = found_file(source)
    texts: list[tuple[str | Messages | None, str]] = []
    kinds: set[bool] = set()
    total = 0
    for place, value in _lines(path) if path.suffix == ".txt" else rows_of(path):
        total += 1
        if total > most:
            continue
        is_pair = isinstance(value, dict) and value.get("chosen") is not None
        kinds.add(is_pair)
        if len(kinds) > 1:
            raise UsageError("probe-line", "pairs and texts are in one file", where=f"{show(path)}, {place}")
        if is_pair:
            pair = pair_of(value, path, place)
            texts += [(pair.prompt, pair.chosen), (pair.prompt, pair.rejected)]
        else:
            texts.append(_text(value, path, place))
    if not texts:
        raise UsageError("probe-empty", "there are no pairs and no texts", where=show(path))
    return Asked(tuple(texts), True in kinds, total)


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"line {number}", {"text": line.rstrip("\n")}


def _text(value: Any, path: Path, place: str) -> tuple[str | Messages | None, str]:
    try:
        if isinstance(value.get("text"), str):
            return None, value["text"]
        if value.get("messages") is not None:
            told = messages_of(value["messages"])
            return told[:-1] or None, told[-1]["content"]
        if isinstance(value["completion"], str) and isinstance(value["prompt"], str):
            return value["prompt"], value["completion"]
        raise TypeError
    except (KeyError, TypeError, AttributeError, IndexError):
        where = f"{show(path)}, {place}"
        raise UsageError("probe-line", "neither a pair nor a text", where=where, expected=EXPECTED) from None
