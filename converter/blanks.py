"""No command that is printed has a blank for its user to fill in: a name to write to is chosen, the rest is asked for.

Whoever says what to do may leave words open, in capitals: `OUT` for a new folder, `BASE` for a base model that nobody
here knows. A new folder gets a name beside what it is made of. A command with another blank would only be refused
again, so that it becomes a sentence that says which option is needed, and of what.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

from converter.diagnostic import PROGRAM, Again, Command, Next, Steps, as_argument, parts, quoted

OUTPUTS = frozenset({"OUT", "MERGED", "./NEW_FOLDER"})
"""Words that stand for a folder to write."""

_ASKED: Mapping[str, str] = {
    "--base": "the folder or the Hub name of the base model",
    "--weights-from": "a folder of the same run that still holds them, as global_step500",
    "--lora-alpha": "the lora_alpha of the training script",
    "--from": "the trainer that saved it",
    "--to": "the trainer that shall load it",
    "--label": "the number of the row that is the reward",
    "--vocab": "the number of rows",
    "--against": "the folder that it was made from",
    "--probe": "a file of preference pairs",
    "--world-size": "the number of ranks",
    "--max-shard-size": "a size, as 5GB",
}
_FOLDERS = {"ADAPTER": "the folder of the adapter", "BASE": "the folder of the base model"}
_OPEN = frozenset({"DIR", "BASE", "ADAPTER", "DIALECT", "TRAINER", "SRC", "FILE", "N", "RANKS", "RUN/global_stepN"})
NEW_NAMES = {"gather": "gathered", "repair": "fixed", "merge-lora": "merged", "reshard": "resharded", "run": "made"}
"""By verb: what a new folder of it is called, behind the name of what it is made of."""
_MOST_NAMES = 100


def without_blanks(step: Next | None, typed: Command | None = None) -> Next | None:
    """A step whose commands can be typed as they stand.

    Args:
        typed: what the user typed, which is called "the same command" in a sentence.
    """
    if isinstance(step, Again) and step.otherwise is not None:
        step = step.otherwise
    if isinstance(step, Command):
        return _closed(step, [], typed)
    if not isinstance(step, Steps):
        return step
    named: list[str] = []
    return Steps(*(_closed(p, named, typed) if isinstance(p, Command) else p for p in parts(step)))


def has_blank(command: Command) -> bool:
    """True where a word of a command is left open."""
    return any(map(_is_open, command.arguments))


def new_name(source: str, word: str) -> str:
    """A path to write to, beside a folder and not there yet: `./rm-fixed`.

    The folder of a file is an input too, and so is that of a config above a run's `global_step5`: what is written lies
    beside it, or it would be refused.
    """
    typed = os.path.expanduser(source)
    if not os.path.exists(typed):  # a model on the Hub: `owner/name@revision`
        source = f"./{source.removeprefix('hf://').partition('@')[0].rstrip('/').rpartition('/')[2]}"
    elif os.path.isfile(typed):
        stem = os.path.splitext(os.path.basename(source))[0]
        source = os.path.normpath(os.path.join(os.path.dirname(source), "..", stem))
    elif os.path.basename(above := os.path.dirname(source.rstrip("/"))) not in ("", ".", "..") and _has_config(above):
        return new_name(above, word)
    elif os.path.basename(source.rstrip("/")) in ("", ".", ".."):
        real = os.path.basename(os.path.realpath(typed)) or "root"
        source = os.path.normpath(os.path.join(source, "..", real))
    first = f"{source.rstrip('/')}-{word}"
    names = (first if n == 1 else f"{first}-{n}" for n in range(1, _MOST_NAMES))
    return as_argument(next((n for n in names if not os.path.lexists(os.path.expanduser(n))), first))


def _has_config(folder: str) -> bool:
    try:
        return any(n.endswith("config.json") for n in os.listdir(os.path.expanduser(folder)))
    except OSError:
        return False


def _closed(command: Command, named: list[str], typed: Command | None) -> Command | str:
    """A command without blanks, or the sentence that asks for what it lacks.

    Args:
        named: the folder that an earlier command of the same step writes.
    """
    arguments = list(command.arguments)
    if any(w in OUTPUTS and not os.path.lexists(w) for w in arguments):
        if not (named and arguments[0] in OUTPUTS):
            source = next((w for w in arguments if w not in OUTPUTS and not w.startswith("-")), "model")
            named[:] = [new_name(source, NEW_NAMES.get(command.verb, "converted"))]
        arguments = [named[0] if w in OUTPUTS else w for w in arguments]
    command = Command(command.verb, tuple(arguments), command.program)
    if not has_blank(command):
        return command
    asked, kept = _taken_out(arguments)
    rest = Command(command.verb, tuple(kept), command.program)
    words = " and ".join(f"{name} and {what}" if what else name for name, what in asked)
    is_same = typed is not None and _without_values(rest) == _without_values(typed)
    # Without the program's name, so that nobody takes the beginning of a sentence for a command.
    begun = " ".join(map(quoted, rest.words[rest.program == PROGRAM :]))
    return f"{'the same command' if is_same else begun} with {words}"


def _taken_out(arguments: list[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """The options whose values are left open, and the other words."""
    asked: list[tuple[str, str]] = []
    kept: list[str] = []
    for word in arguments:
        if not _is_open(word):
            kept.append(word)
        elif kept and kept[-1].startswith("--"):
            option = kept.pop()
            asked.append((option, _ASKED.get(option, "its value")))
        else:
            asked.append((_FOLDERS.get(word, "the folder that is meant"), ""))
    return asked, kept


def _without_values(command: Command) -> tuple[str, ...]:
    return (command.verb, *_free(command.arguments))


def _free(arguments: tuple[str, ...]) -> Iterator[str]:
    """The words before the first option: what the command is about."""
    for word in arguments:
        if word.startswith("-"):
            return
        yield word


def _is_open(word: str) -> bool:
    return word in _OPEN and not os.path.lexists(word)
