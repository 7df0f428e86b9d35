"""What `explain` does: the meaning of a code, of a pasted error, or of a training log."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from converter.diagnostic import Command, Next, as_argument
from converter.errors import UsageError
from converter.text import nearest, show

if TYPE_CHECKING:
    from converter.examine.explanations.log import Seen

_LOG = re.compile(r"\S+\.(?:log|txt|out|err|jsonl?)", re.ASCII)
"""What is meant for a log's path: one word with the end of one."""
_CODE = re.compile(r"[a-z0-9]+(?:-[a-z0-9]+)*", re.ASCII)
_BLOCK = 1 << 20
_ORDER = ("error", "changes-numbers", "cosmetic")


@dataclass(frozen=True)
class Explanation:
    """What a code means, and what to do.

    Attributes:
        zh: the same in one line of Chinese; None where there is none.
        seen_in: where a message's text was found, as `PACKAGE VERSION: FILE`.
    """

    code: str
    text: str
    next: tuple[Next, ...] = ()
    zh: str | None = None
    seen_in: tuple[str, ...] = ()


@dataclass(frozen=True)
class Messages:
    """Known messages that were found in a text, the worst first; of a log as it is written, in its order.

    Attributes:
        is_log: lines are counted; false for a pasted text.
    """

    found: tuple[Seen, ...]
    is_log: bool = True

    def at_or_above(self, severity: str | None) -> bool:
        """True where one is as bad as `severity`, or worse."""
        limit = -1 if severity is None else _ORDER.index(severity)
        return any(_ORDER.index(s.message.severity) <= limit for s in self.found)


def explain(
    what: str | Path | Iterable[bytes],
    *,
    on_message: Callable[[Seen], bool | None] | None = None,
    on_read: Callable[[int, int], object] | None = None,
) -> Explanation | Messages:
    """A code (`Explanation`); a log file, a pasted error, or a stream of bytes (`Messages`).

    Args:
        what: a code, a path, a text, or blocks of bytes as they come.
        on_message: called with each message when it is first met; true ends the reading.
        on_read: called with the bytes of each block of a file that was read, and with the file's size.

    Raises:
        UsageError: no text (`usage`), an unknown code (`unknown-code`), or a path that is
            not a file (`path-not-a-file`).
    """
    from converter.examine.explanations.log import match, unknown_error

    if not isinstance(what, str | Path):
        return Messages(tuple(_read(what, on_message, live=True)))
    subject = str(what)
    if not subject.strip():
        raise UsageError("usage", "the text is empty", next=Command("explain", ("--help",)))
    path = Path(subject).expanduser()
    code = subject.strip()
    if _names_a_file(path) and not (path.is_dir() and explained(code) is not None):
        if path.is_dir():
            look = Command("doctor", (as_argument(subject),))
            raise UsageError("path-not-a-file", "this is a folder", where=show(subject), next=look)
        return Messages(_sorted(_read(_file(path, on_read), on_message)))
    if _CODE.fullmatch(code) and match(code) is None:
        return _of_code(code)
    if _LOG.fullmatch(code):
        raise UsageError("path-missing", f"there is no file {show(subject)}", expected="a log, an error or a code")
    pasted = _sorted(_read([subject.encode("utf-8", "replace")], on_message))
    unknown = None if pasted else unknown_error(subject)
    return Messages(pasted if unknown is None else (unknown,), is_log=False)


def _read(
    blocks: Iterable[bytes], on_message: Callable[[Seen], bool | None] | None, *, live: bool = False
) -> Iterator[Seen]:
    """Each message once, when it is first met; how often it came is counted until the end."""
    from converter.examine.explanations.log import read

    for seen, is_new in read(blocks, live=live):
        if is_new:
            yield seen
            if on_message is not None and on_message(seen):
                return


def _sorted(found: Iterable[Seen]) -> tuple[Seen, ...]:
    return tuple(sorted(found, key=lambda s: (_ORDER.index(s.message.severity), s.line)))


def _of_code(code: str) -> Explanation:
    from converter.examine.explanations import chinese

    found = explained(code)
    if found is None:
        known = known_codes()
        near = nearest(code, known, n=3, cutoff=0.7) or [c for c in known if f"-{code}-" in f"-{c}-"][:3]
        raise UsageError(
            "unknown-code",
            f"nothing here has the code {show(code)}, and there is no file of that name",
            expected=", ".join(near) if near else None,
            next=Command("explain", (near[0] if near else "the pasted error",)),
        )
    return Explanation(code, *found, zh=chinese.of_code(code), seen_in=_seen_in(code))


def _seen_in(code: str) -> tuple[str, ...]:
    from converter.examine.explanations.log import MESSAGES

    return next((message.seen_in for message in MESSAGES if message.code == code), ())


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


def _file(path: Path, on_read: Callable[[int, int], object] | None) -> Iterator[bytes]:
    from converter.core.files.opening import open_input

    fd = open_input(path)
    try:
        size = os.fstat(fd).st_size
        while block := os.read(fd, _BLOCK):
            yield block
            if on_read is not None:
                on_read(len(block), size)
    finally:
        os.close(fd)
