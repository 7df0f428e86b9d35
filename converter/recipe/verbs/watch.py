"""What `watch` does: doctor for each checkpoint of a run, once, as soon as it is complete."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converter.errors import ConvertError, UsageError
from converter.recipe.verbs.at_rest import Look, is_unfinished, look, open_for_writing
from converter.recipe.verbs.keeping import Keep, Remembered, folders_to_keep
from converter.recipe.verbs.knobs import Where
from converter.recipe.verbs.waiting import IDLE, Notify, Waiter, waiting
from converter.text import show

INTERVAL = 5.0
"""Seconds between two looks."""

SETTLE = 10.0
"""Seconds for which no file of a checkpoint changes before it is read."""

PATIENCE = 12
"""Settling times after which a checkpoint is examined that rests without its last file: its save was cut off."""


@dataclass(frozen=True)
class Examined:
    """One checkpoint that was examined.

    Attributes:
        path: as the user would type it.
        findings: as `doctor --json` prints them, the worst first.
        failed: why it could not be examined; None where it was.
        not_compared: why names and shapes were not compared with what a load asks for; None where they were.
    """

    path: str
    findings: tuple[Mapping[str, Any], ...] = ()
    failed: str | None = None
    not_compared: str | None = None


def watch(
    run: Where,
    *,
    for_: str | None = None,
    deep: bool = False,
    ignore: Sequence[str] = (),
    once: bool = False,
    interval: float = INTERVAL,
    settle: float = SETTLE,
    state: Where | None = None,
    notify: Notify = "auto",
) -> Watching:
    """Every checkpoint in a run's folder, examined once when it is complete; goes on until the caller stops.

    The oldest come first, since a trainer that keeps a number of them removes those. A checkpoint is complete when none
    of its files has changed, been added or been open for writing for `settle` seconds, and no name says that a save is
    under way. What changes while it is examined is examined again.

    Args:
        run: the folder in which a trainer saves checkpoints.
        for_: a trainer: what its loader does with each.
        deep: read values too.
        ignore: codes to leave out.
        once: examine what is there now, and end; what is being written then is left for another time.
        interval: seconds between two looks.
        settle: seconds for which nothing may change.
        state: a file that remembers what was examined; None: one for this run in the user's own state folder.
        notify: `inotify`: the kernel tells of changes; `poll`: looks at intervals; `auto`: the kernel where the package
            `watchfiles` is installed and the file system is of this machine alone.

    Raises:
        UsageError: there is no such folder (`path-missing`), or no trainer is known by that name.
    """
    root = Path(run).expanduser()
    if not root.is_dir():
        raise UsageError("path-missing", f"there is no folder {show(str(run))}", expected="a run's folder")
    memory = Memory(Path(state).expanduser() if state is not None else _state_file(root), f"{for_} {deep} {[*ignore]}")
    knobs = {"for_": for_, "deep": deep, "ignore": ignore}
    return Watching(
        str(run), root, memory, _told(str(run), root, memory, knobs, _Timing(once, interval, settle), notify)
    )


class Watching(Iterator[Examined]):
    """Checkpoints as they are examined, and what must not be removed meanwhile."""

    def __init__(self, asked: str, root: Path, memory: Memory, told: Generator[Examined]) -> None:
        self._asked, self._root, self._memory, self._told = asked, root, memory, told

    def __next__(self) -> Examined:
        """The next one that is complete; waits for it."""
        return next(self._told)

    def close(self) -> None:
        """Watch no more."""
        self._told.close()

    @property
    def keep(self) -> tuple[Keep, ...]:
        """Folders that must not be rotated away, by what was examined until now, in earlier runs too: sole copies of
        what a checkpoint lacks, and the newest checkpoint that can be used where the newest of all can't.
        """
        there = [(f, self._memory.of(f.name)) for f in _candidates(self._root)]
        return folders_to_keep(self._asked, [(f.name, of) for f, of in there if of is not None])


@dataclass(frozen=True)
class _Timing:
    """When to look, and for how long nothing may change."""

    once: bool
    interval: float
    settle: float

    def pause(self, waiter: Waiter, is_pending: bool) -> float:
        """Seconds to the next look, at the most."""
        return IDLE if waiter.is_told and not is_pending and not self.once else self.interval


def _told(
    asked: str, root: Path, memory: Memory, knobs: Mapping[str, Any], timing: _Timing, notify: Notify
) -> Generator[Examined]:
    with waiting(root, notify) as waiter:
        yield from _watched(asked, root, memory, knobs, timing, waiter)


def _watched(
    asked: str, root: Path, memory: Memory, knobs: Mapping[str, Any], timing: _Timing, waiter: Waiter
) -> Iterator[Examined]:
    since: dict[str, tuple[Look, float]] = {}
    first_look: float | None = None
    while True:
        began = time.monotonic()
        is_pending = False
        for folder in _candidates(root):
            seen, now = look(folder), time.monotonic()
            if seen is None or memory.holds(folder.name, seen):
                continue
            is_pending = True
            before = since.get(folder.name)
            if before is None or before[0] != seen:
                since[folder.name] = (seen, now)
                continue
            if not _is_complete(folder, seen, now - before[1], timing.settle):
                continue
            found = examined(os.path.join(asked, folder.name), knobs)
            if look(folder) != seen:
                since.pop(folder.name, None)  # it was written to meanwhile, or rotated away
                continue
            memory.learn(folder.name, seen, Remembered.of(found.findings, found.failed, asked))
            yield found
            memory.save()
        # At the end of `settle` all that rested since the first look was examined; the rest is being written.
        first_look = time.monotonic() if first_look is None else first_look
        if timing.once and began - first_look >= timing.settle:
            return
        waiter.wait(timing.pause(waiter, is_pending))


def _candidates(root: Path) -> list[Path]:
    """Folders of the run that are checkpoints by name or content, by their numbers; never one that is being made."""
    from converter.examine.doctor import RUN_FOLDER
    from converter.sources.finding import kind_of
    from converter.sources.places import by_number

    try:
        with os.scandir(root) as listed:
            names = [e.name for e in listed if e.is_dir() and not e.name.startswith(".") and not is_unfinished(e.name)]
    except OSError:
        return []
    folders = sorted((root / name for name in names), key=by_number)
    return [f for f in folders if RUN_FOLDER.fullmatch(f.name) or kind_of(f) is not None]


def _is_complete(folder: Path, seen: Look, rested: float, settle: float) -> bool:
    if rested < settle or seen.is_empty or seen.has_temporary or open_for_writing(folder):
        return False
    return not seen.lacks_its_last_file or rested >= settle * PATIENCE


def examined(asked: str, knobs: Mapping[str, Any]) -> Examined:
    """Doctor's findings; what stops it is a result too.

    Raises:
        UsageError: the knobs name a trainer or a code that nobody knows.
    """
    from converter.recipe.verbs.doctor import doctor

    try:
        report = doctor(asked, **knobs)
        found = tuple(f.to_json() for f in report.findings)
        return Examined(asked, found, not_compared=report.not_compared or None)
    except ConvertError as error:
        if error.code in ("unknown-trainer", "unknown-code", "trainer-version"):
            raise
        return Examined(asked, failed=error.what)
    except OSError as error:
        return Examined(asked, failed=error.strerror or str(error))
    except Exception as bug:  # one checkpoint that nobody foresaw does not end the watch of all others
        return Examined(asked, failed=f"a bug in doctor: {type(bug).__name__}: {bug}")


class Memory:
    """What was examined, in a file: a restart repeats nothing. Another question about the run has its own answers."""

    def __init__(self, file: Path, question: str) -> None:
        self._file, self._question = file, question
        answers = self._all().get(question)
        self._answers: dict[str, Any] = answers if isinstance(answers, dict) else {}

    def _all(self) -> dict[str, Any]:
        """Answers to every question, as they are in the file now."""
        try:
            told = json.loads(self._file.read_text("utf-8"))
        except (OSError, ValueError):
            return {}
        return told if isinstance(told, dict) else {}

    def holds(self, name: str, seen: Look) -> bool:
        """True where this state of the folder was examined."""
        answer = self._answers.get(name)
        return isinstance(answer, dict) and answer.get("state") == seen.digest

    def of(self, name: str) -> Remembered | None:
        """What was learned of a folder when it was examined last; None where it never was."""
        answer = self._answers.get(name)
        if not isinstance(answer, dict):
            return None
        sole = answer.get("sole")
        return Remembered(answer.get("usable") is True, tuple(map(str, sole)) if isinstance(sole, list) else ())

    def learn(self, name: str, seen: Look, told: Remembered) -> None:
        """Remember it; `save` writes it down, once the caller has said it."""
        self._answers[name] = {"state": seen.digest, "usable": told.usable, "sole": list(told.sole)}

    def save(self) -> None:
        """Replace the file, whole; another watch may write its answers to it."""
        self._file.parent.mkdir(parents=True, exist_ok=True)
        fd, new = tempfile.mkstemp(prefix=f"{self._file.name}.", suffix=".new", dir=self._file.parent)
        try:
            with open(fd, "w", encoding="utf-8") as file:
                file.write(json.dumps({**self._all(), self._question: self._answers}))
            os.replace(new, self._file)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(new)
            raise


def _state_file(root: Path) -> Path:
    home = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    digest = hashlib.sha256(os.fsencode(os.path.realpath(root))).hexdigest()[:24]
    return Path(home) / "rlhf-convert" / f"watch-{digest}.json"
