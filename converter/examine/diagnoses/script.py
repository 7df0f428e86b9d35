"""Training scripts, read and never run: which trainer they start, and with which folders and options.

Shell scripts, single command lines, and YAML of trainers that are started with one. Variables that the script itself
sets to plain words are put in; anything else that a shell would compute stays as it stands, and is not judged.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from converter.core.files.opening import read_limited
from converter.dialects.known import dialects
from converter.dialects.spec import Role, Serves
from converter.errors import ConvertError, UsageError
from converter.text import show

MAX_SCRIPT = 1 << 20
MAX_TOKENS = 20_000

_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)(?:\[[@*]\])?(?::?[-=]([^{}]*))?\})", re.ASCII)
_MOST_NESTED = 4
_OUTPUTS = frozenset({"save_path", "output_dir", "ckpt_path", "default_local_dir", "ckpt.output_dir"})


@cache
def _entries() -> tuple[Serves, ...]:
    """What is known of trainers, those whose command lines are known by a word first."""
    found = [s for d in dialects().values() for s in d.serves]
    return tuple(sorted(found, key=lambda s: not s.launch_marks))


def roles_of_options(trainer: str | None) -> dict[str, Role]:
    """Options that name a model's folder, and what it is used as."""
    return {option: role for s in _entries() if s.trainer == trainer for option, role in s.launch_roles}


def _started(words: list[str], options: Mapping[str, str]) -> str | None:
    """The trainer that a command starts: by the first word that is a trainer's, else by its options together."""
    for word in words:
        for serves in _entries():
            if any(re.fullmatch(mark, word, re.ASCII) for mark in serves.launch_marks):
                return serves.trainer
    given = [s for s in _entries() if s.launch_options and set(options) >= set(s.launch_options)]
    return given[0].trainer if given else None


def _of_yaml(options: Mapping[str, str]) -> str | None:
    """The trainer that a YAML file is for."""
    return next((s.trainer for s in _entries() if not set(options).isdisjoint(s.launch_keys)), None)


@dataclass(frozen=True)
class Launch:
    """What a script starts.

    Attributes:
        path: the script, as the user typed it.
        trainer: as `--for` names it; None where no known one is started.
        options: by name without dashes; the last one of a name counts, as for the trainers' own parsers.
        computed: options whose value a shell would compute.
        made: folders that commands of the script write.
    """

    path: str
    trainer: str | None
    options: Mapping[str, str] = field(default_factory=dict)
    computed: frozenset[str] = frozenset()
    made: frozenset[str] = frozenset()

    def models(self) -> Iterator[tuple[str, Role, str]]:
        """Option, role and value for every model that the script names."""
        for name, role in roles_of_options(self.trainer).items():
            value = self.options.get(name)
            if value and name not in self.computed:
                yield name, role, value

    def find(self, value: str) -> Path | None:
        """A folder that the script names: from the current folder, else from the script's."""
        for start in (Path(), Path(self.path).parent):
            found = start / Path(value).expanduser()
            if found.exists():
                return found
        return None

    def roles_of(self, root: Path) -> list[Role]:
        """The roles in which the script uses a folder."""
        real = os.path.realpath(root)
        places = [(role, self.find(value)) for _, role, value in self.models()]
        return [role for role, place in places if place is not None and os.path.realpath(place) == real]

    def ending(self, *ends: str) -> str | None:
        """The value of the option whose last words are these, whatever section it stands in."""
        for name, value in self.options.items():
            if any(name == end or name.endswith(f".{end}") for end in ends) and name not in self.computed:
                return value
        return None


def read_launch(path: str) -> Launch:
    """A script's trainer and options.

    Raises:
        UsageError: it can't be read, or is larger than any script (`launch-unreadable`).
    """
    file = Path(path).expanduser()
    try:
        text = read_limited(file, limit=MAX_SCRIPT).decode("utf-8", "replace")
    except (ConvertError, OSError) as error:
        what = error.what if isinstance(error, ConvertError) else show(error)
        expected = "a shell script, a command line or a YAML file"
        raise UsageError("launch-unreadable", what, where=show(path), expected=expected) from None
    if file.suffix in (".yaml", ".yml"):
        options = _yaml(text)
        return Launch(path, _of_yaml(options), options)
    return _shell(path, text)


def _shell(path: str, text: str) -> Launch:
    """The last command that names a reward model or critic, else the last one that starts a trainer."""
    variables: dict[str, str] = {"HOME": "~"}
    found: list[tuple[str, dict[str, str]]] = []
    for words in _commands(_with_arrays(text)):
        filled = list(_filled(words, variables))
        for word in filled:
            name, equals, value = word.removeprefix("export ").partition("=")
            if equals and name.isidentifier() and "." not in name:
                variables[name] = value
        options = dict(_options(filled))
        started = _started(filled, options)
        if any(s.launch_keys for s in _entries() if s.trainer == started):
            for word in filled:
                if word.endswith((".yaml", ".yml")):
                    options = _yaml_file(path, word) | options
        if started is not None:
            found.append((started, options))
    if not found:
        return Launch(path, None)
    trainer, options = next((f for f in reversed(found) if _names_a_scorer(*f)), found[-1])
    computed = frozenset(n for n, v in options.items() if "$" in v or "`" in v)
    made = frozenset(os.path.normpath(v) for _, o in found for n, v in o.items() if n.rpartition(".")[2] in _OUTPUTS)
    return Launch(path, trainer, options, computed, made)


def _names_a_scorer(trainer: str, options: Mapping[str, str]) -> bool:
    return any(role != "actor" and name in options for name, role in roles_of_options(trainer).items())


def _with_arrays(text: str) -> str:
    """Arrays of arguments as variables of plain words: `ARGS=(--a b ...)` on one line or many."""
    return re.sub(r"^(\w+\+?)=\(\s*([^()]*?)\s*\)\s*$", _array, text, flags=re.MULTILINE)


def _array(match: re.Match[str]) -> str:
    lines = [re.sub(r"(?:^|\s)#.*", "", line).rstrip("\\ ") for line in match[2].splitlines()]
    return f"{match[1]}={shlex.quote(' '.join(lines))}"


def _commands(text: str) -> Iterator[list[str]]:
    """Commands as words; a line whose quotes do not close is taken word by word, as in a here-document."""
    tokens = 0
    for line in re.sub(r"\\\r?\n", " ", text).splitlines():
        try:
            lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|<>")
            lexer.whitespace_split = True
            words = list(lexer)
        except ValueError:
            words = line.split()
        tokens += len(words)
        if tokens > MAX_TOKENS:
            return
        command: list[str] = []
        for word in (*words, ";"):
            if word.strip(";&|"):
                command.append(word)
            elif command:
                yield command
                command = []


def _filled(words: list[str], variables: Mapping[str, str]) -> Iterator[str]:
    """Words with the script's own variables put in; one that is a list of arguments becomes as many words."""
    for word in words:
        whole = _VARIABLE.fullmatch(word)
        value = _with_variables(word, variables)
        if whole is not None and " " in value and value.lstrip().startswith("-"):
            try:
                yield from (_with_variables(w, variables) for w in shlex.split(value))
            except ValueError:
                yield from value.split()
        else:
            yield value


def _with_variables(word: str, variables: Mapping[str, str], depth: int = 0) -> str:
    """A word with variables and their defaults (`${NAME:-value}`) put in; what the script does not set stays."""

    def value(match: re.Match[str]) -> str:
        bare, braced, default = match.groups()
        known: str | None = variables.get(braced if bare is None else bare, default)
        if known is None or depth >= _MOST_NESTED:
            return match[0]
        return known if "$" not in known else _with_variables(known, variables, depth + 1)

    return _VARIABLE.sub(value, word)


def _options(words: list[str]) -> Iterator[tuple[str, str]]:
    """`--name value`, `--name=value` and hydra's `name=value`; a flag without a value is `true`."""
    for at, word in enumerate(words):
        following = words[at + 1] if at + 1 < len(words) else "--"
        if word.startswith("--") and len(word) > 2:
            name, equals, value = word[2:].partition("=")
            yield name, value if equals else ("true" if following.startswith("--") else following)
        elif "=" in word and not word.startswith(("-", "=")):
            name, _, value = word.lstrip("+~").partition("=")
            yield name, value.strip("'\"")


def _yaml_file(script: str, name: str) -> dict[str, str]:
    for start in (Path(), Path(script).parent):
        try:
            return _yaml(read_limited(start / name, limit=MAX_SCRIPT).decode("utf-8", "replace"))
        except (ConvertError, OSError):
            continue
    return {}


def _yaml(text: str) -> dict[str, str]:
    """Plain values of a YAML mapping as words."""
    import yaml

    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError):
        return {}
    pairs = value.items() if isinstance(value, dict) else ()
    return {str(k): str(v) for k, v in pairs if isinstance(v, str | int | float) and isinstance(k, str)}
