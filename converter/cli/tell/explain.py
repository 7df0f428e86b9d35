"""`rlhf-convert explain`: a code, a pasted error, a log, or a log as it is written."""

from __future__ import annotations

import os
import stat
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from converter.cli.lines import wrapped_step
from converter.cli.progress import progress
from converter.cli.tell.doctor import WIDTH
from converter.diagnostic import Command, Next
from converter.errors import UsageError
from converter.recipe.verbs import explain as verb
from converter.recipe.verbs.explain import Explanation, Messages, known_codes

if TYPE_CHECKING:
    from converter.cli.options import Display
    from converter.cli.speaking import Speaking
    from converter.examine.explanations.log import Seen

_BLOCK = 1 << 20
_LARGE = 64 << 20
"""Bytes of a file from which on it is told how far it is read."""
_WORDS = {"error": "ERROR", "changes-numbers": "NUMBERS", "cosmetic": "harmless"}


def explain(subject: str | None, fail_on: str | None, options: Speaking) -> int:
    """Explain what was asked for; exit code 1 only where `--fail-on` says so.

    Raises:
        UsageError: see `converter.explain`.
    """
    if subject is None:
        return _list_codes(options)
    if subject == "-":
        return _live(fail_on, options)
    with _progress(options) as on_read:
        found = verb.explain(subject, on_read=on_read)
    if isinstance(found, Explanation):
        _tell_code(found, options)
        return 0
    for seen in found.found:
        options.sink.screen(_screen(seen, numbered=found.is_log, in_chinese=options.in_chinese))
    return _ended(found, fail_on, options)


@contextmanager
def _progress(options: Speaking) -> Iterator[Callable[[int, int], object]]:
    """Of a large file how far it is read: a bar on a terminal, elsewhere a line now and then."""
    with progress(options.sink) as reporter:
        is_begun = False

        def on_read(count: int, size: int) -> None:
            nonlocal is_begun
            if size < _LARGE:
                return
            if not is_begun:
                reporter.start(size, 1)
                is_begun = True
            reporter.advance(count, "reading")

        yield on_read


def _live(fail_on: str | None, options: Speaking) -> int:
    """A log as it is written: each message when it comes; a job can be ended at the first that is bad enough."""

    def tell(seen: Seen) -> bool:
        options.sink.screen(_screen(seen, numbered=True, in_chinese=options.in_chinese))
        return Messages((seen,)).at_or_above(fail_on)

    found = verb.explain(_stdin(), on_message=tell)
    assert isinstance(found, Messages)
    return _ended(found, fail_on, options)


def _ended(found: Messages, fail_on: str | None, options: Speaking) -> int:
    if not found.found:
        options.sink.screen(_nothing(not found.is_log))
    options.sink.json({"messages": [_json(s) for s in found.found]})
    return 1 if found.at_or_above(fail_on) else 0


def _tell_code(found: Explanation, options: Speaking) -> None:
    above = [found.zh] if found.zh and options.in_chinese else []
    lines = [found.code, *above, *textwrap.wrap(found.text, WIDTH), *_printed_by(found.seen_in), *_advice(found.next)]
    options.sink.screen(lines)
    steps = list(map(str, found.next))
    told = {"code": found.code, "text": found.text, "zh": found.zh, "next": steps, "seen_in": list(found.seen_in)}
    options.sink.json(told)


def _printed_by(places: Sequence[str], indent: str = "") -> list[str]:
    """Where a message's text was found, one place a line."""
    return [f"{indent}{'seen in ' if at == 0 else '        '}{place}" for at, place in enumerate(places)]


def _advice(steps: Sequence[Next], indent: str = "") -> list[str]:
    """What to do, one arrow each; commands stay whole, so that they can be copied."""
    return [each for step in steps for each in wrapped_step(step, WIDTH, f"{indent}-> ")]


def _list_codes(options: Display) -> int:
    codes = known_codes()
    options.sink.screen([*codes, "", "rlhf-convert explain CODE, a log file, `-`, or a pasted error"])
    options.sink.json({"codes": codes})
    return 0


def _stdin() -> Iterator[bytes]:
    """What comes, when it comes: a block is not waited for until it is full."""
    stream = sys.stdin.buffer
    fd = stream.fileno()
    if stat.S_ISDIR(os.fstat(fd).st_mode):
        raise UsageError("path-not-a-file", "standard input is a folder")
    while block := os.read(fd, _BLOCK):
        yield block


def _nothing(pasted: bool) -> Sequence[str]:
    what = "This text is not" if pasted else "Nothing in it is"
    return [f"{what} a message that is known here. rlhf-convert doctor DIR looks at the files themselves."]


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
