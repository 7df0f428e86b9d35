"""Every command that a screen prints, typed into a shell on the folder that produced it, until one succeeds.

A refusal has to lead on: to a command that works, or to one that is refused for something else. A step that leads back
to a refusal that was said before is a loop, and its user is stuck.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from served_shell import Said, Shell, Typed

if TYPE_CHECKING:
    from walk_inputs import Place

REPEATABLE = ("--allow", "--weights-from", "--adapter", "--weight", "--input", "--ignore")
SHOWING = ("doctor", "inspect", "verify", "explain", "diff")
BLANK = re.compile(r"[A-Z][A-Z_]*(?:/\w*[A-Z])?|\./NEW_FOLDER|(?:LAST_)?CHECKPOINT")
"""A word that a user would have to fill in; no path of the walk's is written in capitals."""
DEEPEST = 6
FAILED = 4
Mark = tuple[str, str, str | None]
"""What an error is known again by: its code, its text, and where."""


@dataclass
class Walk:
    """What was typed, and what is wrong with what was printed."""

    shell: Shell
    folder: Path
    typed: int = 0
    wrong: list[str] = field(default_factory=list)

    def go(self, line: str) -> None:
        """Type a line, and every command that follows from it."""
        self._follow(line, ())

    def _type(self, line: str) -> Typed:
        done = self.shell.type(line, self.folder)
        self.typed += 1
        if done.code == 70 or "Traceback" in done.err:
            self.wrong.append(f"{line}: a bug: {done.err[-400:]}")
        return done

    def _follow(self, line: str, seen: tuple[Mark, ...]) -> None:
        free = [path for path in paths_in(line, self.folder) if not os.path.lexists(path)]
        self._follow_typed(line, self._type(line), seen)
        for path in free:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif os.path.lexists(path):
                path.unlink()

    def _follow_typed(self, line: str, done: Typed, seen: tuple[Mark, ...]) -> None:
        error = next((s for s in reversed(done.said) if s.exit is not None), None)
        if error is None:
            if not seen:
                for finding in done.said:
                    self._follow_all(line, finding, ())
                self._follow_printed(line, done)
            return
        self._expect_printed(line, done, error)
        self.follow_error(line, error, seen)

    def follow_error(self, line: str, error: Said, seen: tuple[Mark, ...] = ()) -> None:
        """What an error's commands lead to."""
        mark = (error.code, error.text, error.where)
        if mark in seen:
            self.wrong.append(f"{line}: leads back to {error.code}: {error.text[:160]}")
        elif len(seen) == DEEPEST:
            self.wrong.append(f"{line}: no end: {[m[0] for m in seen]}")
        else:
            if not error.commands:
                self.wrong.append(f"{line}: {error.code} prints no command: {[s['text'] for s in error.steps]}")
            self._follow_all(line, error, (*seen, mark))

    def _expect_printed(self, line: str, done: Typed, error: Said) -> None:
        for command in error.commands:
            if command not in done.err and command not in done.out:
                self.wrong.append(f"{line}: {command} is not on the screen")

    def _follow_all(self, line: str, said: Said, seen: tuple[Mark, ...]) -> None:
        for command in said.commands:
            self.wrong += [f"{line}: {said.code}: {why}: {command}" for why in faults(command)]
            if command.startswith(("rlhf-convert ", "ls ")):
                self._follow(command, seen or ((said.code, said.text, None),))

    def _follow_printed(self, line: str, done: Typed) -> None:
        """The last lines of a screen: what was written is looked at as they say, what fails is looked into."""
        _, label, block = done.out.rpartition("\nNext: ")
        if not label or (line.split()[1] in SHOWING and done.code != FAILED):
            return
        for each in filter(is_typed, map(str.strip, block.split("\n"))):
            self.wrong += [f"{line}: {why}: {each}" for why in faults(each)]
            if each.startswith("rlhf-convert "):
                self._follow(each, (("printed", each, None),))


def is_typed(line: str) -> bool:
    """True for a line of a screen that is a command or a shell's comment; sentences are for people to read."""
    return (
        line.startswith(("rlhf-convert ", "python", "ls ", "mv ", "cp ", "#", "-", "vllm ")) and " with --" not in line
    )


def walk(shell: Shell, place: Place, verb: str) -> Walk:
    """The walk from one verb on one folder."""
    begun = Walk(shell, place.folder)
    begun.go(place.line(verb))
    return begun


def paths_in(line: str, here: Path) -> list[Path]:
    """What a command may write: each of its words as a path, and the folder in which that is staged."""
    words = [w for w in shlex.split(line, comments=True)[2:] if not w.startswith("-") and "=" not in w]
    named = [Path(os.path.abspath(here / os.path.expanduser(w))) for w in words]
    return [*named, *(path.with_name(f"{path.name}.partial") for path in named)]


def faults(command: str, own: Collection[str] = ()) -> Iterator[str]:
    """What no command may have, whatever it does.

    Args:
        own: words that the user typed, whatever they look like.
    """
    words = shlex.split(command, comments=True)
    if any(w.startswith("[") and w not in own for w in words):
        yield "has a part that is to be left out or filled in"
    flags = [w.partition("=")[0] for w in words if w.startswith("--")]
    typed = [w.partition("=")[0] for w in own]
    twice = (f for f in sorted(set(flags)) if flags.count(f) > max(1, typed.count(f)) and f not in REPEATABLE)
    yield from (f"gives {f} twice" for f in twice)
    if any(part in ("optimizer", "optim") for w in words if w not in own for part in w.split("/")):
        yield "names an optimizer's folder"
    if "..." in words:
        yield "leaves words out"
    open_words = [w for w in words[2:] if BLANK.fullmatch(w) and w not in own]
    yield from (f"has a blank: {w}" for w in open_words if command.startswith("rlhf-convert "))


def main() -> int:
    """Walk from every verb on every folder, or on those that are named; print what is wrong, and how much was typed."""
    from walk_inputs import BREAKAGES, VERBS, Places

    typed, wrong = 0, 0
    with tempfile.TemporaryDirectory() as root, Shell() as shell:
        places = Places(Path(root))
        for key in sys.argv[1:] or BREAKAGES:
            place = places.broken(key)
            for verb in VERBS:
                found = walk(shell, place, verb)
                typed, wrong = typed + found.typed, wrong + len(found.wrong)
                for each in found.wrong:
                    print(f"{key} {verb}: {each}", flush=True)
    print(json.dumps({"folders": len(sys.argv[1:] or BREAKAGES), "typed": typed, "wrong": wrong}))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
