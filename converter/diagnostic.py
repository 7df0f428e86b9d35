"""One shape for "something is wrong", and what to do about it as a value: commands are words, never text to take apart.

A command is spelt here and nowhere else: `str()` of one is what can be pasted into a shell.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

PROGRAM = "rlhf-convert"

Severity = Literal["error", "changes-numbers", "cosmetic", "info"]
"""`error`: it does not load, or not as what it is; `changes-numbers`: it loads with other numbers than were trained;
`cosmetic`: harmless; `info`: nothing is wrong.
"""


@dataclass(frozen=True)
class Command:
    """A command line as words.

    Attributes:
        verb: of this program; empty where another one is run.
        arguments: each a word, unquoted; capitals as `OUT` stand for what the user has to choose.
        program: what is run.
    """

    verb: str
    arguments: tuple[str, ...] = ()
    program: str = PROGRAM

    @property
    def words(self) -> tuple[str, ...]:
        """Every word, the program first."""
        return (self.program, *([self.verb] if self.verb else []), *self.arguments)

    def with_options(self, *options: str) -> Command:
        """The command with these options, each once: a value that is given replaces the one that is there.

        Args:
            options: names with dashes, each followed by its value where it takes one.
        """
        arguments = list(self.arguments)
        for name, values in _grouped(options):
            arguments = _without(arguments, name, takes_value=bool(values))
            end = arguments.index("--") if "--" in arguments else len(arguments)
            arguments[end:end] = [name, *values]
        return Command(self.verb, tuple(arguments), self.program)

    def without(self, name: str) -> Command:
        """The command without an option and its value."""
        return Command(self.verb, tuple(_without(list(self.arguments), name, takes_value=True)), self.program)

    def __str__(self) -> str:
        return " ".join(map(quoted, self.words))


@dataclass(frozen=True)
class Again:
    """The command that the user typed, with other options. Whoever knows the command line completes it.

    Attributes:
        options: to add, each name followed by its value where it takes one.
        leave_out: names of options to leave out.
        otherwise: the command that does it, where the one that the user typed takes no such option.
    """

    options: tuple[str, ...] = ()
    leave_out: tuple[str, ...] = ()
    otherwise: Command | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The options that the user's command has to take."""
        return tuple(w.partition("=")[0] for w in (*self.options, *self.leave_out) if w.startswith("--"))

    def of(self, command: Command) -> Command:
        """The whole command."""
        for name in self.leave_out:
            command = command.without(name)
        return command.with_options(*self.options)

    def __str__(self) -> str:
        if self.otherwise is not None:
            return str(self.otherwise)
        words = "run the same command again" if not self.names else "the same command"
        words += f" with {' '.join(map(quoted, self.options))}" if self.options else ""
        return words + (f" without {' and '.join(self.leave_out)}" if self.leave_out else "")


@dataclass(frozen=True, init=False)
class Steps:
    """Commands and sentences in order; sentences bring the words and the punctuation between commands.

    Two commands that follow each other are to be run one after the other, the second if the first succeeds.
    """

    parts: tuple[str | Command | Again, ...]

    def __init__(self, *parts: Next | None) -> None:
        flat: list[str | Command | Again] = []
        for part in parts:
            flat += part.parts if isinstance(part, Steps) else [] if part is None else [part]
        object.__setattr__(self, "parts", tuple(flat))

    def __str__(self) -> str:
        text, before = "", None
        for part in self.parts:
            follows = isinstance(part, Command) and isinstance(before, Command)
            text += f"{' && ' if follows else ''}{part}"
            before = part
        return text


Next = str | Command | Again | Steps
"""What to do: a sentence, a command, the user's command with other options, or several of them in order."""


def commands(step: Next | None) -> tuple[Command, ...]:
    """The commands in a step, in order."""
    held = ((p.otherwise if isinstance(p, Again) else p) for p in parts(step))
    return tuple(p for p in held if isinstance(p, Command))


def is_command(step: Next | None) -> bool:
    """True where a step is nothing but commands: it can be typed as it stands."""
    held = parts(step)
    return bool(held) and all(isinstance(p, Command) for p in held)


def completed(step: Next | None, command: Command, takes: Callable[[str], bool] = lambda _: True) -> Next | None:
    """A step in which "the same command" is the one that the user typed.

    Args:
        takes: tells whether that command has an option of a name.
    """
    if isinstance(step, Again):
        return step.of(command) if all(map(takes, step.names)) else step.otherwise or step
    if isinstance(step, Steps):
        return Steps(*(completed(p, command, takes) for p in step.parts))
    return step


def renamed(step: Next | None, option: str, to: str) -> Next | None:
    """A step in which an option of "the same command" has the name that the user's verb gives it."""
    if isinstance(step, Again):
        return Again(tuple(to if w == option else w for w in step.options), step.leave_out, step.otherwise)
    if isinstance(step, Steps):
        return Steps(*(renamed(part, option, to) for part in step.parts))
    return step


def as_argument(path: str) -> str:
    """A path as an argument: one that begins with a dash is not an option."""
    return f"./{path}" if path.startswith("-") and path != "-" else path


def spelled(step: Next | None) -> str | None:
    """A step as text, for JSON: None where there is none."""
    return None if step is None else str(step)


def quoted(word: str) -> str:
    """A word for bash: as it is where that is safe, else quoted; what a terminal would act on is escaped."""
    if word.isprintable():
        return shlex.quote(word)
    return "$'" + "".join(_ansi_quoted(c) for c in word) + "'"


def _ansi_quoted(character: str) -> str:
    if character in "'\\":
        return f"\\{character}"
    if character.isprintable():
        return character
    # Of a surrogate that no byte of a path became, as a config may spell one: no path has it, so that any bytes do.
    return "".join(f"\\{byte:03o}" for byte in _bytes_of(character))


def _bytes_of(character: str) -> bytes:
    try:
        return os.fsencode(character)
    except UnicodeEncodeError:
        return character.encode("utf-8", "surrogatepass")


def parts(step: Next | None) -> tuple[str | Command | Again, ...]:
    """The parts of a step, in order; none where there is no step."""
    return () if step is None else step.parts if isinstance(step, Steps) else (step,)


def _grouped(options: tuple[str, ...]) -> Iterator[tuple[str, list[str]]]:
    name, values = "", list[str]()
    for word in options:
        if word.startswith("--"):
            if name:
                yield name, values
            name, values = word.partition("=")[0], []
            if "=" in word:
                name, values = word, []
        else:
            values.append(word)
    if name:
        yield name, values


def _without(words: list[str], option: str, *, takes_value: bool) -> list[str]:
    name = option.partition("=")[0]
    kept: list[str] = []
    skip = False
    for at, word in enumerate(words):
        if skip:
            skip = False
        elif word == "--":
            return [*kept, *words[at:]]
        elif word == name:
            skip = takes_value or "=" in option
        elif not word.startswith(f"{name}="):
            kept.append(word)
    return kept


@dataclass(frozen=True, kw_only=True)
class Diagnostic:
    """Something that is wrong, or good to know.

    Attributes:
        code: stable kebab-case name of the condition.
        severity: how bad it is.
        text: one sentence or two; strings of the input in it are shown escaped.
        where: the file, folder or tensor concerned.
        evidence: what proves it: names with shapes, files, byte counts, what was expected and found.
        next: what to do about it.
        facts: what another part of the program may act on, by name; it never looks for them in `text`.
    """

    code: str
    severity: Severity
    text: str
    where: str | None = None
    evidence: tuple[str, ...] = ()
    next: Next | None = None
    facts: tuple[tuple[str, str | int], ...] = ()

    def fact(self, name: str) -> str | int | None:
        """A fact by its name."""
        return dict(self.facts).get(name)
