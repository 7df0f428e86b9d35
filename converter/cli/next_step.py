"""What an error ends with: a command in the user's own paths, whatever raised it.

Whoever raises an error names the step that helps, where one is known: "the same command" with other options, a command
with `OUT` for a name that only the user can choose, or a sentence. Here the words that the user typed are put in. An
error whose step has no command gets one: doctor, of the folder that it is about, says all that is wrong there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

from converter.blanks import NEW_NAMES, OUTPUTS, has_blank, new_name, without_blanks
from converter.diagnostic import Again, Command, Next, Steps, as_argument, commands, completed, parts, renamed
from converter.errors import ConvertError, UsageError

_OF_THE_OUTPUT = frozenset({"output-nests", "output-exists"})
_OF_THE_SYSTEM = frozenset({"no-space", "system"})
_SHOWS = " shows all that is wrong there"
_RECORDED = " shows what is recorded there"


def complete(error: ConvertError, verb: str, arguments: list[str]) -> None:
    """Give an error a step whose commands can be typed.

    Args:
        arguments: what the user typed behind the verb.
    """
    typed = _parsed(verb, arguments)
    if any(isinstance(p, Again) for p in parts(error.next)):
        _complete_again(error, verb, arguments, typed)
    step = _with_output(error.next, typed, verb)
    error.next = without_blanks(step, Command(verb, tuple(arguments)))
    if error.exit_code in (2, 3, 4) and not commands(error.next):
        asks = any(has_blank(c) and "--weights-from" not in c.arguments for c in commands(step))
        error.next = _elsewhere(error, verb, arguments, typed) or _with_command(error, verb, typed, asks=asks)


@dataclass(frozen=True)
class _Typed:
    """A command line in its parts.

    Attributes:
        options: names of options that the verb takes.
        inputs: paths and Hub ids that the user gave, in order, the output left out.
        output: OUT, however it was given.
    """

    options: frozenset[str]
    inputs: tuple[str, ...]
    output: str | None


def _parsed(verb: str, arguments: list[str]) -> _Typed:
    from converter.cli.verbs.all import command_of

    command = command_of(verb)
    takes_value = {
        name: not getattr(p, "is_flag", False) for p in command.params for name in (*p.opts, *p.secondary_opts)
    }
    names = [p.name for p in command.params if p.param_type_name == "argument"]
    free, given = _split(arguments, takes_value)
    at = names.index("out") if "out" in names else len(free)
    output = next((v for n, v in given if n in ("-o", "--out")), free[at] if at < len(free) else None)
    values = [v.rpartition("=")[2] if n == "--input" else v for n, v in given]
    inputs = [w for w in (*free, *values) if w != output]
    return _Typed(frozenset(takes_value), tuple(inputs), output)


def _split(arguments: list[str], takes_value: dict[str, bool]) -> tuple[list[str], list[tuple[str, str]]]:
    """Words that are no options, and options with their values."""
    free: list[str] = []
    given: list[tuple[str, str]] = []
    words = iter(arguments)
    for word in words:
        if word == "--":
            free += words
        elif not word.startswith("-") or word == "-":
            free.append(word)
        elif "=" in word:
            name, _, value = word.partition("=")
            given.append((name, value))
        elif takes_value.get(word):
            given.append((word, next(words, "")))
    return free, given


def _complete_again(error: ConvertError, verb: str, arguments: list[str], typed: _Typed) -> None:
    from converter.sources.hub.secrets import words_without_token

    if "--to" not in typed.options and "--for" in typed.options:
        error.next = renamed(error.next, "--to", "--for")  # what writes says --to of a trainer, what reports --for
    error.next = completed(error.next, Command(verb, tuple(words_without_token(arguments))), typed.options.__contains__)


def _with_output(step: Next | None, typed: _Typed, verb: str) -> Next | None:
    """The step with the user's own output where one command has a placeholder: the refusal has left that name free.

    A command over another input than the first, as a repair of the base, makes something else: its name is its own.
    """
    waiting = [c for c in commands(step) if any(w in OUTPUTS for w in c.arguments)]
    if typed.output is None or len(waiting) != 1 or os.path.lexists(os.path.expanduser(typed.output)):
        return step
    (old,) = waiting
    source = next((w for w in old.arguments if w not in OUTPUTS and not w.startswith("-")), "")
    is_another = os.path.lexists(os.path.expanduser(source)) and not any(_is_below(source, w) for w in typed.inputs[:1])
    if is_another and old.verb != verb:
        return step
    words = (as_argument(typed.output) if w in OUTPUTS else w for w in old.arguments)
    new = Command(old.verb, tuple(words), old.program)
    return _replaced(step, old, new)


def _replaced(step: Next | None, old: Command, new: Command) -> Next | None:
    if isinstance(step, Steps):
        return Steps(*(_replaced(p, old, new) for p in step.parts))
    return new if step == old else step


def _elsewhere(error: ConvertError, verb: str, arguments: list[str], typed: _Typed) -> Next | None:
    """What to do where the output can't be written, and no input has a fault: another name, or a look at it."""
    if error.code in _OF_THE_SYSTEM and typed.output is not None:
        program, option = ("df", "-h") if error.code == "no-space" else ("ls", "-ld")
        return Steps(*_sentence(error.next), Command("", (option, _above(typed.output)), program=program))
    if error.code not in _OF_THE_OUTPUT or typed.output not in arguments or not typed.inputs:
        return None
    other = new_name(typed.inputs[0], NEW_NAMES.get(verb, "converted"))
    from converter.sources.hub.secrets import words_without_token

    words = words_without_token([other if w == typed.output else w for w in arguments])
    return Steps(*_sentence(error.next), Command(verb, tuple(words)))


def _with_command(error: ConvertError, verb: str, typed: _Typed, *, asks: bool) -> Next:
    """The step with a command behind it that shows more.

    Args:
        asks: the step asks the user for something, and nothing need be wrong with the folder.
    """
    folder = _folder(error, typed)
    if error.code == "path-missing":
        return Steps(*_sentence(error.next), Command("", (_parent(typed),), program="ls"))
    is_about_words = isinstance(error, UsageError) and error.where is None
    elsewhere = _folder_of(error)
    if not is_about_words and elsewhere is not None and (folder is None or verb == "doctor"):
        return Steps(*_sentence(error.next), Command("", ("-l", as_argument(elsewhere)), program="ls"))
    if folder is None or is_about_words or verb == "doctor":
        return Steps(*_sentence(error.next), Command(verb, ("--help",)))
    look = Command("inspect" if asks else "doctor", (as_argument(folder),))
    return look if error.next is None else Steps(*_sentence(error.next), look, _RECORDED if asks else _SHOWS)


def _sentence(step: Next | None) -> Iterator[Next]:
    if step is not None:
        yield from (step, "; ")


def _folder(error: ConvertError, typed: _Typed) -> str | None:
    """The folder that the user named and that the error is about, else the first that there is."""
    there = [w for w in typed.inputs if os.path.isdir(os.path.expanduser(w))]
    held = [w for w in there if error.where and _is_below(error.where, w)]
    is_elsewhere = bool(error.where) and os.path.lexists(os.path.expanduser(error.where or ""))
    return max(held, key=len) if held else there[0] if there and not is_elsewhere else None


def _folder_of(error: ConvertError) -> str | None:
    """The folder that an error is about by its own words; None where it names none."""
    path = os.path.expanduser(error.where or "")
    if not path or not os.path.lexists(path):
        return None
    return path if os.path.isdir(path) else os.path.dirname(path) or "."


def _is_below(where: str, folder: str) -> bool:
    inner, outer = (os.path.abspath(os.path.expanduser(p)) for p in (where, folder))
    return inner == outer or inner.startswith(outer.rstrip("/") + "/")


def _parent(typed: _Typed) -> str:
    """The nearest folder that there is above the first input that is missing."""
    return _above(next((w for w in typed.inputs if not os.path.exists(os.path.expanduser(w))), "."))


def _above(path: str) -> str:
    """The nearest folder that there is at or above a path."""
    path = os.path.expanduser(path)
    while path and not os.path.isdir(path):
        path = os.path.dirname(path)
    return as_argument(path or ".")
