"""The program as Typer sees it; the verbs register themselves from `verbs/`."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from functools import cache
from typing import Annotated, Any, get_args

import typer
from typer.core import TyperCommand

from converter.cli.options import OUTPUT, PANELS, with_options

ABOUT = (
    "Convert RLHF checkpoints: streaming, bounded in memory, verified.\n\n"
    "A bare `rlhf-convert PATH` inspects it; `rlhf-convert --version` prints the version."
)


def _new_app() -> typer.Typer:
    """An empty program. Plain text: for colours in help rich would have to be imported."""
    return typer.Typer(
        name="rlhf-convert",
        help=ABOUT,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        add_completion=False,
        no_args_is_help=True,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    )


class Paneled(TyperCommand):
    """A command whose options stand in panels, those of the verb itself first. Typer's own panels would import rich."""

    def format_options(self, ctx: typer.Context, formatter: Any) -> None:  # type: ignore[override]
        """Write arguments, then the panels that have an option."""
        panels: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": [], **{name: [] for name in PANELS}}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is None:
                continue
            kind = "Arguments" if parameter.param_type_name == "argument" else "Options"
            if parameter.name == "help":
                kind = OUTPUT
            panels[getattr(parameter, "rich_help_panel", None) or kind].append(record)
        for name, records in panels.items():
            if records:
                with formatter.section(name):
                    formatter.write_dl(records)


def value_of(parameter: Any) -> tuple[str, tuple[str, ...]]:
    """What an option or argument takes: the name of its type, and the values to choose from, where they are listed."""
    annotation = parameter.type_descriptor.annotation
    inner = [a for a in get_args(annotation) if a is not type(None)]
    annotation = inner[0] if inner else annotation
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return "choice", tuple(str(each.value) for each in annotation)
    return str(getattr(annotation, "__name__", "text")), ()


app = _new_app()
"""All verbs by name, for the list of them: it has none of their parameters, which take longer to make than to list."""

_verbs: dict[str, Callable[[], typer.Typer]] = {}


@cache
def command_of(verb: str) -> Any:
    """A verb with its parameters, as a program of its own."""
    return typer.main.get_command(_verbs[verb]())


def _listed() -> None:
    """Stands for a verb in the list of all."""


def verb(
    name: str, kind: type[Any], *, help: str, short_help: str, examples: tuple[str, str, str]
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a verb that takes the options of `kind`; its help ends with the examples."""
    # Backspace on a line of its own tells Typer not to re-wrap what follows.
    epilog = "\b\nExamples:\n" + "\n".join(f"  {each}" for each in examples)

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        def alone() -> typer.Typer:
            program = _new_app()
            program.command(name, cls=Paneled, help=help, epilog=epilog)(with_options(kind)(function))
            return program

        _verbs[name] = alone
        app.command(name, short_help=short_help)(_listed)
        return function

    return register


Out = Annotated[
    str | None,
    typer.Argument(metavar="OUT", help="Folder to write, hf://owner/name or s3://bucket/folder.", show_default=False),
]
