"""How long the Hub is asked again, and the one line that says so: the client's own lines quote signed addresses."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

ATTEMPTS = 6
FIRST_WAIT = 1.0
LONGEST_WAIT = 8.0

ENOUGH = 30.0
"""Seconds of nothing but failures after which no further try is made: one try of the client's may take as long."""

AT_WORK = 120.0
"""Seconds of a try that sent or read something for most of the time, and failed then."""

AGAIN_TOLD = 30.0
"""Seconds after which the same trouble is worth another line."""

listener: Callable[[str], None] | None = None
"""Is told of trouble, a line each; None: nobody is."""


class Patience:
    """One loop of tries, whatever fails in it; the time that the client spends on tries of its own counts."""

    def __init__(self) -> None:
        self._failed, self._wait = 0, FIRST_WAIT
        self._began = time.monotonic()
        self._since: float | None = None

    def again(self, error: Exception) -> bool:
        """After a failure: wait and return True, or return False where it was enough; a second try is always made."""
        now = time.monotonic()
        if self._since is None or now - self._began > AT_WORK:
            self._since = now if now - self._began > AT_WORK else self._began
        self._failed += 1
        if self._failed == ATTEMPTS or (self._failed > 1 and now - self._since > ENOUGH):
            return False
        _tell(trouble(error))
        time.sleep(self._wait)
        self._wait, self._began = min(LONGEST_WAIT, self._wait * 2), time.monotonic()
        return True


@contextmanager
def heard() -> Iterator[None]:
    """What the client says of its own tries becomes our one line meanwhile."""
    with _lock:
        if not _hearing:
            logging.getLogger(_CLIENT).addFilter(_ours)
        _hearing.append(True)
    try:
        yield
    finally:
        with _lock:
            _hearing.pop()
            if not _hearing:
                logging.getLogger(_CLIENT).removeFilter(_ours)


def trouble(error: Exception) -> str:
    """What a failure looks like from here, in a few words."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    status = status or getattr(getattr(error.__cause__, "response", None), "status_code", None)
    return f"the Hub answers {status}" if isinstance(status, int) else _SILENT


_CLIENT = "huggingface_hub.utils._http"
"""Source: https://github.com/huggingface/huggingface_hub/blob/v2.4.0/src/huggingface_hub/utils/_http.py"""

_STATUS = re.compile(r"HTTP Error (\d+) thrown while requesting ", re.ASCII)
_WAITING = re.compile(r"Rate limited\. Waiting ([\d.]+)s ", re.ASCII)
_OTHER = re.compile(r"'.*' thrown while requesting |Retrying in ", re.ASCII | re.DOTALL)
_SHORT = 10.0

_lock = threading.Lock()
_hearing: list[bool] = []
_told: dict[str, float] = {}


def _ours(record: logging.LogRecord) -> bool:
    text = record.getMessage()
    if status := _STATUS.match(text):
        _tell(f"the Hub answers {status[1]}")
    elif waiting := _WAITING.match(text):
        if float(waiting[1]) > _SHORT:
            _tell(f"the Hub asks to wait {float(waiting[1]):.0f} s")
    elif found := _OTHER.match(text):
        if found[0] != "Retrying in ":
            _tell(_SILENT)
    else:
        return True
    return False


_SILENT = "the Hub does not answer"


def _tell(what: str) -> None:
    now = time.monotonic()
    with _lock:
        if now - _told.get(what, -AGAIN_TOLD) < AGAIN_TOLD:
            return
        _told[what] = now
    if listener is not None:
        listener(f"{what}: trying again, for a minute at most" if "wait" not in what else what)
