"""Write the man page, docs/rlhf-convert.1, from what `--help` is made of.

python tools/write_man.py            writes it
python tools/write_man.py --check    writes nothing; exit code 1 where it is not what it should be
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parents[1] / "docs" / "rlhf-convert.1"

EXITS = (
    ("0", "done, or nothing found"),
    ("1", "findings that count, or differences"),
    ("2", "the command line or the recipe can't be run"),
    ("3", "refused or failed: nothing is written"),
    ("4", "what was written, or what was verified, is not what it should be; it is not published"),
    ("70", "a bug of this program"),
    ("130, 143", "interrupted"),
)


def escaped(text: str) -> str:
    """Text for roff: backslashes, hyphens, and what begins a line."""
    text = text.replace("\\", "\\e").replace("-", "\\-").replace("\n", " ").replace("`", "")
    return f"\\&{text}" if text.startswith((".", "'")) else text


def option(parameter: Any) -> list[str]:
    """An option with its help."""
    flag = getattr(parameter, "is_flag", False)
    value = "" if flag else f" \\fI{escaped(metavar(parameter))}\\fR"
    names = ", ".join(f"\\fB{escaped(n)}\\fR" for n in sorted(parameter.opts, key=len))
    return [".TP", names + value, escaped(parameter.help or "")]


def metavar(parameter: Any) -> str:
    """What stands for the value."""
    from converter.cli.app import value_of

    kind, choices = value_of(parameter)
    return "|".join(choices) or str(parameter.metavar or kind.upper())


def verb(name: str) -> list[str]:
    """A verb: how it is called, what it does, its own options, its examples."""
    import dataclasses

    from converter.cli.options import Conversion
    from converter.cli.verbs.all import command_of

    command = command_of(name)
    shared = {f.name for f in dataclasses.fields(Conversion)}
    arguments = [metavar(p) if p.required else f"[{metavar(p)}]" for p in command.params if is_argument(p)]
    lines = [f".SS {name}", f".B rlhf\\-convert {escaped(name)}", f"[\\fIoptions\\fR] {escaped(' '.join(arguments))}"]
    lines += [".PP", escaped(command.help or "")]
    own = [p for p in command.params if not is_argument(p) and p.name not in shared]
    for parameter in own:
        lines += option(parameter)
    examples = [line.strip() for line in (command.epilog or "").splitlines() if line.startswith("  ")]
    return [*lines, ".PP", "Examples:", ".PP", ".nf", *(f".RS\n{escaped(e)}\n.RE" for e in examples), ".fi"]


def is_argument(parameter: Any) -> bool:
    return bool(parameter.param_type_name == "argument")


def shared_options() -> list[str]:
    """The options that all verbs which write have."""
    import dataclasses

    from converter.cli.options import Conversion
    from converter.cli.verbs.all import command_of

    shared = {f.name for f in dataclasses.fields(Conversion)}
    found = [p for p in command_of("reshard").params if p.name in shared]
    return [line for each in found for line in option(each)]


def page() -> str:
    """The whole page."""
    from converter.cli import VERBS
    from converter.cli.app import ABOUT
    from converter.version import __version__

    lines = [f'.TH RLHF\\-CONVERT 1 "" "rlhf\\-convert {__version__}" "User Commands"', ".SH NAME"]
    lines += ["rlhf\\-convert \\- convert, merge, repair and examine RLHF checkpoints", ".SH SYNOPSIS"]
    lines += [".B rlhf\\-convert", "\\fIVERB\\fR [\\fIoptions\\fR] [\\fIarguments\\fR]", ".SH DESCRIPTION"]
    for paragraph in ABOUT.split("\n\n"):
        lines += [".PP", escaped(paragraph)]
    lines += [".SH VERBS", *(line for name in VERBS for line in verb(name))]
    lines += [".SH OPTIONS OF THE VERBS THAT WRITE", *shared_options(), ".SH EXIT STATUS"]
    for code, meaning in EXITS:
        lines += [".TP", f"\\fB{code}\\fR", escaped(meaning)]
    lines += [".SH ENVIRONMENT", ".TP", "\\fBRLHF_CONVERT_DEBUG\\fR", "1: tracebacks are shown."]
    lines += [".TP", "\\fBHF_TOKEN, HF_HOME, HF_ENDPOINT\\fR", escaped("as huggingface_hub reads them.")]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Write or compare."""
    made = page()
    if "--check" in sys.argv[1:]:
        return int(not PAGE.is_file() or PAGE.read_text("utf-8") != made)
    PAGE.write_text(made, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
