"""`rlhf-convert watch`: one line for each checkpoint of a run.

`watch --json` prints one object a line, each with

    version       1; it changes with the shape of what follows
    path          the checkpoint
    verdict       sound, not compared, numbers, error or not examined
    failed        why it could not be examined, or null
    not_compared  why names and shapes were not compared with what a load asks for, or null
    findings      as `doctor --json` prints them

and with `--keep-sole-copies`, first and where it changes, an object with

    version       1
    keep          folders that must not be rotated away, each a path and why
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from converter.cli.tell.posting import expect_url, post
from converter.errors import UsageError
from converter.examine.glance import glance_of
from converter.recipe.verbs import watch as verb
from converter.recipe.verbs.keeping import Keep
from converter.text import show

if TYPE_CHECKING:
    from converter.cli.options import Display
    from converter.cli.sink import Sink


def watch(
    run: str,
    fail_on: str,
    options: Display,
    *,
    on_error: str | None,
    fail_fast: bool,
    once: bool,
    post_to: str | None = None,
    keep_sole_copies: bool = False,
    **knobs: Any,
) -> int:
    """Tell of each checkpoint once it is complete; exit code 1 where one of them is as bad as `fail_on` or worse."""
    command = None if on_error is None else command_of(on_error)
    expect_url(post_to)
    sink, code = options.sink, 0
    watching = verb.watch(run, once=once, **knobs)
    sink.tell(f"watching {show(run)}; {'ends when all that is there was examined' if once else 'Ctrl-C ends it'}")
    keeping = _Keeping(watching, sink, post_to) if keep_sole_copies else None
    if keeping is not None and watching.keep:
        keeping.tell()
    for each in watching:
        glance = glance_of(each.path, each.findings, fail_on, failed=each.failed, not_compared=each.not_compared)
        sink.screen([glance.line])
        told: dict[str, Any] = {"version": 1, "path": each.path, "verdict": glance.word, "failed": each.failed}
        told |= {"not_compared": each.not_compared, "findings": list(each.findings)}
        _say(told, sink, post_to)
        if keeping is not None:
            keeping.tell()
        if not glance.bad and each.failed is None:
            continue
        code = 1
        if command is not None and (status := _run(command, each.path)):
            sink.tell(f"--on-error: {show(command[0])} ended with {status}")
        if fail_fast:
            return code
    if keeping is not None:
        keeping.tell()
    return code


def _say(told: Mapping[str, Any], sink: Sink, post_to: str | None) -> None:
    """One object, to who reads JSON and to who asked for a post."""
    if sink.as_json:
        sink.data(json.dumps(told))
    if post_to is not None and (failure := post(post_to, told)) is not None:
        sink.tell(f"--post: {failure}")


class _Keeping:
    """Says which folders must stay: at first, and where it changes."""

    def __init__(self, watching: verb.Watching, sink: Sink, post_to: str | None) -> None:
        self._watching, self._sink, self._post_to = watching, sink, post_to
        self._last: tuple[Keep, ...] | None = None

    def tell(self) -> None:
        """Say it where it was not said yet."""
        now = self._watching.keep
        if now == self._last:
            return
        self._last = now
        lines = [f"keep {show(each.path)}: {show(each.why)}" for each in now]
        self._sink.screen(lines or ["keep: no folder is known that has to stay, but the newest checkpoint"])
        _say({"version": 1, "keep": [{"path": k.path, "why": k.why} for k in now]}, self._sink, self._post_to)


def command_of(text: str) -> list[str]:
    """A command as words; no shell takes part.

    Raises:
        UsageError: it is not a command, or no program has its name (`on-error`).
    """
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UsageError("on-error", f"--on-error can't be split into words: {error}") from None
    if not words or shutil.which(words[0]) is None:
        raise UsageError("on-error", f"--on-error: no program is named {show(words[0] if words else '')}")
    return words


def _run(command: Sequence[str], path: str) -> int:
    """Run it, `{}` being the checkpoint; what it prints goes to stderr, since stdout is for data."""
    return subprocess.run([w.replace("{}", path) for w in command], stdout=2, check=False).returncode
