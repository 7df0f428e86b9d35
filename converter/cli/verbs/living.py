"""Verbs beside a running training: names, arguments, help."""

from __future__ import annotations

from typing import Annotated

import typer

from converter.cli.app import verb
from converter.cli.options import OUTPUT, Display, FailOnChoice


@verb(
    "watch",
    Display,
    short_help="Examine each checkpoint of a run once it is complete.",
    help="Examine each checkpoint of a run with doctor, once, as soon as it is complete, and print a line each. What "
    "is being written is not read. A restart repeats nothing. With --json: one object a line.",
    examples=(
        "rlhf-convert watch ./run",
        "rlhf-convert watch ./run --for openrlhf --on-error 'notify-send {}'",
        "rlhf-convert watch ./run --once --json",
    ),
)
def watch(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Folder that gets checkpoints.", show_default=False)],
    options: Display,
    target: Annotated[
        str | None,
        typer.Option("--for", metavar="TRAINER", help="Say what this loader does with each.", show_default=False),
    ] = None,
    deep: Annotated[bool, typer.Option("--deep", help="Read values too: NaN, zeros, heads that never moved.")] = False,
    ignore: Annotated[
        list[str] | None,
        typer.Option("--ignore", metavar="CODE", help="Leave this one out. Repeatable.", show_default=False),
    ] = None,
    fail_on: Annotated[
        FailOnChoice, typer.Option("--fail-on", help="The least severity that counts as an error.")
    ] = FailOnChoice.error,
    fail_fast: Annotated[bool, typer.Option("--fail-fast", help="End with exit code 1 at the first error.")] = False,
    on_error: Annotated[
        str | None,
        typer.Option(
            "--on-error",
            metavar="CMD",
            help="Run this at each error, without a shell; {} is the checkpoint.",
            show_default=False,
        ),
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="Examine what is there now, and end.")] = False,
    interval: Annotated[
        float, typer.Option("--interval", metavar="SECONDS", min=0.05, help="Time between two looks.")
    ] = 5.0,
    settle: Annotated[
        float, typer.Option("--settle", metavar="SECONDS", min=0.1, help="Time for which nothing may change.")
    ] = 10.0,
    state: Annotated[
        str | None,
        typer.Option(
            "--state",
            metavar="FILE",
            help="Remembers what was examined; default: one for RUN, in ~/.local/state.",
            show_default=False,
            rich_help_panel=OUTPUT,
        ),
    ] = None,
) -> int:
    """`rlhf-convert watch`."""
    from converter.cli.tell.watch import watch

    return watch(
        run, fail_on.value, options, on_error=on_error, fail_fast=fail_fast, once=once, for_=target, deep=deep,
        ignore=ignore or (), interval=interval, settle=settle, state=state,
    )  # fmt: skip
