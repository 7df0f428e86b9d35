"""`rlhf-convert completion SHELL`: a script that completes verbs, options, their choices, trainers, codes and folders.

The script holds all words: a shell that completes starts no Python. It is made of the parameters that parse the command
line; trainers and codes are those of this installation, plug-ins included.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from converter.cli.app import app, command_of, value_of
from converter.diagnostic import PROGRAM

if TYPE_CHECKING:
    from converter.cli.options import Display

FILES = ("--probe", "--launch", "--output", "--report", "--state", "--python")
"""Options whose value is a file; of others that take a value and no choice it is a folder, or nobody knows it."""

_FOLDERS = ("--base", "--out", "--weights-from", "--against", "--with-actor", "--adapter")
_TRAINERS = ("--to", "--for", "--from")
_CODES = ("--ignore", "--allow")
_NAMED = {"explain": "codes", "schema": "schemas", "completion": "shells"}
"""Verbs whose first argument is a word of a list."""

SHELLS = ("bash", "zsh", "fish")


@dataclass(frozen=True)
class Option:
    """An option of a verb.

    Attributes:
        values: what its value is chosen from; None: a file or folder, or anything.
        list: the name of a list that its value is chosen from.
    """

    names: Sequence[str]
    help: str
    takes_value: bool
    values: Sequence[str] | None = None
    list: str = ""


@dataclass(frozen=True)
class Verb:
    """A verb: its line of help, its options, and the list that its first argument is chosen from."""

    name: str
    about: str
    options: Sequence[Option]
    list: str = ""


def completion(shell: str, options: Display) -> int:
    """Print the script."""
    scripts = {"bash": bash, "zsh": zsh, "fish": fish}
    options.sink.data(scripts[shell](list(verbs())).rstrip("\n"))
    return 0


def verbs() -> Iterator[Verb]:
    """Every verb of the command line."""
    for command in app.registered_commands:
        name = str(command.name)
        found = [_option(p) for p in command_of(name).params if p.param_type_name == "option"]
        found.append(Option(("-h", "--help"), "Show this message and exit.", False))
        yield Verb(name, command.short_help or "", found, _NAMED.get(name, ""))


def _lists() -> Mapping[str, Sequence[str]]:
    from converter.cli.tell.schema import PRINTED, RECEIPT
    from converter.dialects.known import trainers
    from converter.recipe.verbs.explain import known_codes

    return {
        "trainers": sorted(trainers()),
        "codes": known_codes(),
        "schemas": (*PRINTED, RECEIPT),
        "shells": SHELLS,
    }


def _option(parameter: Any) -> Option:
    takes_value = not getattr(parameter, "is_flag", False)
    values = value_of(parameter)[1] or None
    is_free = values is None and takes_value
    named = "trainers" if is_free and any(n in _TRAINERS for n in parameter.opts) else ""
    named = "codes" if is_free and any(n in _CODES for n in parameter.opts) else named
    return Option((*parameter.opts, *parameter.secondary_opts), parameter.help or "", takes_value, values, named)


def _words(words: Sequence[str]) -> str:
    """Words for a script, in single quotes: none of them is one that a shell would act on."""
    safe = [w for w in words if re.fullmatch(r"[\w@.+=-]+", w)]
    return shlex.quote(" ".join(safe))


def _assigned() -> list[str]:
    """The lists as variables of a shell."""
    return [f"_rlhf_convert_{name}={_words(words)}" for name, words in _lists().items()]


# bash


def bash(found: Sequence[Verb]) -> str:
    """For bash 4 and later."""
    lines = [f"# bash completion of {PROGRAM}; made by `{PROGRAM} completion bash`", *_assigned(), "_rlhf_convert() {"]
    lines += ['  local cur="${COMP_WORDS[COMP_CWORD]}" prev="${COMP_WORDS[COMP_CWORD-1]}" verb="${COMP_WORDS[1]}"']
    lines += ["  local words='' named=''", "  COMPREPLY=()"]
    lines += ['  if [ "$COMP_CWORD" -eq 1 ]; then', f"    words={_words([v.name for v in found])}"]
    lines += [
        '    COMPREPLY=($(compgen -W "$words --help --version" -- "$cur") $(compgen -d -- "$cur"))',
        "    return",
        "  fi",
    ]
    lines += ['  case "$verb" in']
    for verb in found:
        lines += [f"    {verb.name})", f"      words={_words([n for o in verb.options for n in o.names])}"]
        lines += [f"      named=$_rlhf_convert_{verb.list}"] if verb.list else []
        lines += ['      case "$prev" in']
        lines += [f"        {case}) {what}; return;;" for case, what in _cases(verb)]
        lines += ["      esac;;"]
    lines += ["  esac", '  case "$cur" in', '    -*) COMPREPLY=($(compgen -W "$words" -- "$cur"));;']
    lines += ['    *) COMPREPLY=($(compgen -W "$named" -- "$cur")); compopt -o filenames 2>/dev/null']
    lines += ['       COMPREPLY+=($(compgen -d -- "$cur"));;', "  esac", "}"]
    return "\n".join([*lines, f"complete -F _rlhf_convert {PROGRAM}", ""])


def _cases(verb: Verb) -> Iterator[tuple[str, str]]:
    """What follows an option that takes a value."""
    for option in (o for o in verb.options if o.takes_value):
        case = "|".join(option.names)
        if option.list:
            yield case, f'COMPREPLY=($(compgen -W "$_rlhf_convert_{option.list}" -- "$cur"))'
        elif option.values is not None:
            yield case, f'COMPREPLY=($(compgen -W {_words(option.values)} -- "$cur"))'
        elif any(n in FILES for n in option.names):
            yield case, 'compopt -o filenames 2>/dev/null; COMPREPLY=($(compgen -f -- "$cur"))'
        elif any(n in _FOLDERS for n in option.names):
            yield case, 'compopt -o filenames 2>/dev/null; COMPREPLY=($(compgen -d -- "$cur"))'
        else:
            yield case, "COMPREPLY=()"


# zsh


def zsh(found: Sequence[Verb]) -> str:
    """A file for $fpath, or to be read by .zshrc."""
    lines = [f"#compdef {PROGRAM}", f"# made by `{PROGRAM} completion zsh`", *_assigned(), "_rlhf_convert() {"]
    lines += ["  local -a verbs options", "  local verb=$words[2] prev=$words[CURRENT-1]", "  verbs=("]
    lines += [f"    {shlex.quote(f'{v.name}:{_described(v.about)}')}" for v in found]
    lines += [
        "  )",
        "  if (( CURRENT == 2 )); then",
        "    _describe 'verb' verbs",
        "    _files -/",
        "    return",
        "  fi",
    ]
    lines += ["  case $verb in"]
    for verb in found:
        lines += [f"    {verb.name})", "      options=("]
        lines += [f"        {shlex.quote(f'{n}:{_described(o.help)}')}" for o in verb.options for n in o.names]
        lines += ["      )", "      case $prev in"]
        for option in (o for o in verb.options if o.takes_value):
            lines.append(f"        {'|'.join(option.names)}) {_zsh_values(option)}; return;;")
        lines += ["      esac"]
        first = f"      [[ $PREFIX != -* ]] && compadd -- ${{=_rlhf_convert_{verb.list}}}"
        lines += [first] if verb.list else []
        lines += ["      ;;"]
    lines += [
        "  esac",
        "  if [[ $PREFIX == -* ]]; then",
        "    _describe -o 'option' options",
        "  else",
        "    _files -/",
    ]
    lines += ["  fi", "}", 'if [ "$funcstack[1]" = "_rlhf-convert" ]; then', '  _rlhf_convert "$@"', "else"]
    return "\n".join([*lines, f"  compdef _rlhf_convert {PROGRAM}", "fi", ""])


def _zsh_values(option: Option) -> str:
    if option.list:
        return f"compadd -- ${{=_rlhf_convert_{option.list}}}"
    if option.values is not None:
        return f"compadd -- {_words(option.values)[1:-1] if option.values else ''}"
    if any(n in FILES for n in option.names):
        return "_files"
    return "_files -/" if any(n in _FOLDERS for n in option.names) else "_message value"


def _described(text: str) -> str:
    return text.replace(":", "\\:").replace("`", "")


# fish


def fish(found: Sequence[Verb]) -> str:
    """A file for ~/.config/fish/completions."""
    start = f"complete -c {PROGRAM}"
    none = "-n 'test (count (commandline -opc)) -eq 1'"
    lines = [f"# fish completion of {PROGRAM}; made by `{PROGRAM} completion fish`", f"{start} -f"]
    lines += [f"set -g _rlhf_convert_{name} {_words(words)[1:-1]}" for name, words in _lists().items()]
    lines += [f"{start} {none} -a {v.name} -d {_fish(v.about)}" for v in found]
    lines += [f"{start} {none} -l {name}" for name in ("help", "version")]
    for verb in found:
        here = f"-n 'contains -- {verb.name} (commandline -opc)[2]'"
        lines += [f"{start} {here} -a '$_rlhf_convert_{verb.list}'"] if verb.list else []
        lines += [f"{start} {here} -a '(__fish_complete_directories)'"]
        for option in verb.options:
            names = " ".join(f"-l {n[2:]}" if n.startswith("--") else f"-s {n[1:]}" for n in option.names)
            lines.append(f"{start} {here} {names}{_fish_values(option)} -d {_fish(option.help)}")
    return "\n".join([*lines, ""])


def _fish_values(option: Option) -> str:
    if not option.takes_value:
        return ""
    if option.list:
        return f" -x -a '$_rlhf_convert_{option.list}'"
    if option.values is not None:
        return f" -x -a {_words(option.values)}"
    if any(n in FILES for n in option.names):
        return " -r -F"
    return " -x -a '(__fish_complete_directories)'" if any(n in _FOLDERS for n in option.names) else " -x"


def _fish(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"
