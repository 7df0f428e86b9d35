"""`rlhf-convert explain`: a code, a pasted error, a log, or a log as it is written."""

from __future__ import annotations

import os
import re
import stat
import sys
import textwrap
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converter.cli.lines import wrapped_step
from converter.cli.options import Display, Speaking
from converter.cli.tell.doctor import WIDTH
from converter.diagnostic import Command, Next, as_argument
from converter.errors import UsageError
from converter.text import show

if TYPE_CHECKING:
    from converter.examine.explanations.log import Seen

_CODE = re.compile(r"[a-z0-9]+(?:-[a-z0-9]+)*", re.ASCII)
_BLOCK = 1 << 20
_WORDS = {"error": "ERROR", "changes-numbers": "NUMBERS", "cosmetic": "harmless"}
_ORDER = ("error", "changes-numbers", "cosmetic")


def explain(subject: str | None, fail_on: str | None, options: Speaking) -> int:
    """Explain what was asked for; exit code 1 only where `--fail-on` says so.

    Raises:
        UsageError: no text (`usage`), an unknown code (`unknown-code`), or a path that is no file (`path-not-a-file`).
    """
    from converter.examine.explanations.log import match

    if subject is None:
        return _list_codes(options)
    if subject == "-":
        return _explain(_stdin(), fail_on, options, live=True)
    if not subject.strip():
        raise UsageError("usage", "the text is empty", next=Command("explain", ("--help",)))
    path = Path(subject).expanduser()
    code = subject.strip()
    if _names_a_file(path) and not (path.is_dir() and explained(code) is not None):
        if path.is_dir():
            look = Command("doctor", (as_argument(subject),))
            raise UsageError("path-not-a-file", "this is a folder", where=show(subject), next=look)
        return _explain(_file(path), fail_on, options, live=False)
    if _CODE.fullmatch(code) and match(code) is None:
        return _explain_code(code, options)
    return _explain(iter([subject.encode("utf-8", "replace")]), fail_on, options, live=False, pasted=subject)


def _names_a_file(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):
        return False  # a pasted text may be longer than a path can be


def explained(code: str) -> tuple[str, tuple[Next, ...]] | None:
    """What a code means and what to do: a diagnosis's, a refusal's, a check's, a note's, or a message's name."""
    from converter.examine.doctor import diagnoses
    from converter.examine.explanations.codes import codes
    from converter.examine.explanations.log import MESSAGES

    if code in diagnoses():
        return " ".join(diagnoses()[code].doc.split()), ()
    if code in codes():
        found = codes()[code]
        return found.text, (found.next,) if found.next else ()
    for message in MESSAGES:
        if message.code == code:
            return message.general, (*message.steps, *(Command("explain", (c,)) for c in message.codes))
    return None


def known_codes() -> list[str]:
    """Every code that can be explained."""
    from converter.examine.doctor import diagnoses
    from converter.examine.explanations.codes import codes
    from converter.examine.explanations.log import MESSAGES

    return sorted({*diagnoses(), *codes(), *(m.code for m in MESSAGES)})


def _explain_code(code: str, options: Speaking) -> int:
    from converter.examine.explanations import chinese

    found = explained(code)
    if found is None:
        known = known_codes()
        near = get_close_matches(code, known, n=3, cutoff=0.7) or [c for c in known if f"-{code}-" in f"-{c}-"][:3]
        command = Command("explain", (near[0] if near else "the pasted error",))
        raise UsageError(
            "unknown-code",
            f"nothing here has the code {show(code)}, and there is no file of that name",
            expected=", ".join(near) if near else None,
            next=command,
        )
    text, next_ = found
    zh = chinese.of_code(code)
    above = [zh] if zh and options.in_chinese else []
    seen_in = _seen_in(code)
    options.sink.screen([code, *above, *textwrap.wrap(text, WIDTH), *_printed_by(seen_in), *_advice(next_)])
    options.sink.json({"code": code, "text": text, "zh": zh, "next": list(map(str, next_)), "seen_in": seen_in})
    return 0


def _advice(steps: Sequence[Next], indent: str = "") -> list[str]:
    """What to do, one arrow each; commands stay whole, so that they can be copied."""
    return [each for step in steps for each in wrapped_step(step, WIDTH, f"{indent}-> ")]


def _list_codes(options: Display) -> int:
    codes = known_codes()
    options.sink.screen([*codes, "", "rlhf-convert explain CODE, a log file, `-`, or a pasted error"])
    options.sink.json({"codes": codes})
    return 0


def _file(path: Path) -> Iterator[bytes]:
    from converter.core.files.opening import open_input

    fd = open_input(path)
    try:
        while block := os.read(fd, _BLOCK):
            yield block
    finally:
        os.close(fd)


def _stdin() -> Iterator[bytes]:
    """What comes, when it comes: a block is not waited for until it is full."""
    stream = sys.stdin.buffer
    fd = stream.fileno()
    if stat.S_ISDIR(os.fstat(fd).st_mode):
        raise UsageError("path-not-a-file", "standard input is a folder")
    while block := os.read(fd, _BLOCK):
        yield block


def _explain(
    blocks: Iterator[bytes], fail_on: str | None, options: Speaking, *, live: bool, pasted: str | None = None
) -> int:
    from converter.examine.explanations.log import read, unknown_error

    limit = len(_ORDER) if fail_on is None else _ORDER.index(fail_on)
    failed = fail_on is not None
    found: list[Seen] = []
    bad = False
    for seen, is_new in read(blocks, live=live):
        if not is_new:
            continue
        found.append(seen)
        bad = failed and _ORDER.index(seen.message.severity) <= limit
        if live:
            options.sink.screen(_screen(seen, numbered=True, in_chinese=options.in_chinese))
        if live and bad:
            break  # a job can be ended early
    if not found and pasted is not None and (unknown := unknown_error(pasted)) is not None:
        found.append(unknown)
    if not live:
        found.sort(key=lambda s: (_ORDER.index(s.message.severity), s.line))
        for seen in found:
            options.sink.screen(_screen(seen, numbered=pasted is None, in_chinese=options.in_chinese))
    bad = failed and any(_ORDER.index(s.message.severity) <= limit for s in found)
    if not found:
        options.sink.screen(_nothing(pasted is not None))
    options.sink.json({"messages": [_json(s) for s in found]})
    return 1 if bad else 0


def _nothing(pasted: bool) -> Sequence[str]:
    what = "This text is" if pasted else "Nothing in it is"
    return [f"{what} not a message that is known here. rlhf-convert doctor DIR looks at the files themselves."]


def _screen(seen: Seen, *, numbered: bool, in_chinese: bool) -> list[str]:
    from converter.examine.explanations import chinese

    count = f", {seen.count} times" if seen.count > 1 else ""
    at = f" (line {seen.line}{count})" if numbered else ""
    lines = [f"{_WORDS[seen.message.severity]} {seen.message.code}{at}"]
    if numbered:
        lines.append(f"  > {seen.example}")
    zh = chinese.of_message(seen.message.code)
    if zh and in_chinese:
        lines.append(f"  {zh}")
    lines += textwrap.wrap(seen.text, WIDTH, initial_indent="  ", subsequent_indent="  ", break_long_words=False)
    lines += _printed_by(seen.message.seen_in, "  ")
    lines += _advice([*seen.message.steps, *(Command("explain", (code,)) for code in seen.message.codes)], "  ")
    return lines


def _seen_in(code: str) -> list[str]:
    """Where a message's text was found; nothing for other codes."""
    from converter.examine.explanations.log import MESSAGES

    return [place for message in MESSAGES if message.code == code for place in message.seen_in]


def _printed_by(places: Sequence[str], indent: str = "") -> list[str]:
    return [f"{indent}{'seen in ' if at == 0 else '        '}{place}" for at, place in enumerate(places)]


def _json(seen: Seen) -> dict[str, Any]:
    from converter.examine.explanations import chinese

    message = seen.message
    return {
        "name": message.code,
        "severity": message.severity,
        "line": seen.line,
        "count": seen.count,
        "example": seen.example,
        "text": seen.text,
        "zh": chinese.of_message(message.code),
        "next": list(map(str, message.steps)),
        "codes": list(message.codes),
        "seen_in": list(message.seen_in),
        "names": seen.groups,
    }
