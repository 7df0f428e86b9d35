"""Text for screens: strings made safe, names folded, sizes and durations as people write and read them.

Sizes are decimal, as in huggingface_hub: `5GB` is 5 * 10^9 bytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from converter.errors import UsageError


def show(text: object, limit: int = 200) -> str:
    """A string that came from an input, made safe for a terminal and a log: one line, control characters escaped.

    Bidirectional overrides and unpaired surrogates are escaped too; text longer than `limit` is cut with `...`.
    """
    raw = str(text)
    cut = raw if len(raw) <= limit else raw[: max(limit - 3, 0)] + "..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in cut)


_NUMBER = re.compile(r"\d+")


def fold(names: Iterable[str], most: int = 3) -> str:
    """Names that differ in a number only, shown as one: `layers.{0..27}.mlp.up_proj`; at most `most` patterns."""
    patterns: dict[str, list[list[str]]] = {}
    for name in names:
        name = name.replace("\0", "\\x00")  # which stands for a number below
        patterns.setdefault(_NUMBER.sub("\0", name), []).append(_NUMBER.findall(name))
    shown = [_folded(pattern, numbers) for pattern, numbers in list(patterns.items())[:most]]
    rest = len(patterns) - len(shown)
    return ", ".join(shown) + (f" and {rest} more" if rest > 0 else "")


def _folded(pattern: str, numbers: list[list[str]]) -> str:
    """One pattern with its numbers: as they are written, a range where none is missing, else the first few."""
    pieces = pattern.split("\0")
    out = pieces[0]
    for position, piece in enumerate(pieces[1:]):
        values = sorted({n[position] for n in numbers}, key=lambda digits: (len(digits), digits))
        whole = len(values) > 1 and len(values[-1]) < 10 and int(values[-1]) - int(values[0]) == len(values) - 1
        if len(values) == 1:
            out += values[0]
        elif whole:
            out += f"{{{values[0]}..{values[-1]}}}"
        else:
            out += f"{{{','.join(values[:4])}{',..' if len(values) > 4 else ''}}}"
        out += piece
    return show(out)


_UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}

_SIZE = re.compile(r"\s*(\d{1,18}(?:\.\d{1,6})?)\s*([A-Za-z]{0,3})\s*", re.ASCII)


def parse_size(text: str, *, what: str = "size") -> int:
    """Bytes of `5GB`, `200 MB`, `1.5GB`, `512MiB` or a plain number; `what` names the option in the error.

    Raises:
        UsageError: not a size, or less than one byte (`bad-size`).
    """
    match = _SIZE.fullmatch(text)
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None or (size := int(float(match[1]) * unit)) < 1:
        raise UsageError(
            "bad-size", f"{what} is not a size: {show(text)}", expected="a number with KB, MB, GB or TB, such as 5GB"
        )
    # float holds 53 bits; whole numbers of bytes stay exact by not going through it.
    return int(match[1]) * unit if match[1].isdigit() else size


def format_size(count: int) -> str:
    """`14.1 GB`, `20 KB`, `512 B`: three significant digits at most, decimal units."""
    value, unit = float(count), "B"
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if abs(value) < 999.5 or unit == "TB":
            break
        value /= 1000
    if unit == "B" or value >= 99.95:
        return f"{value:.0f} {unit}"
    text = f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"
    return f"{text.rstrip('0').rstrip('.')} {unit}"


def format_duration(seconds: float) -> str:
    """`0:21`, `12:05`, `1:02:03`; rounded to whole seconds."""
    whole = max(round(seconds), 0)
    hours, rest = divmod(whole, 3600)
    minutes, secs = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{secs:02}" if hours else f"{minutes}:{secs:02}"


def nearest(word: str, known: Iterable[str], n: int = 1, cutoff: float = 0.6) -> list[str]:
    """Known words that look most like one, the most alike first."""
    from difflib import get_close_matches

    return get_close_matches(word, list(known), n=n, cutoff=cutoff)
