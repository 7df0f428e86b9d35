"""Verbs beside a running training and in a pipeline: names, arguments, help."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from converter.cli.app import verb
from converter.cli.options import OUTPUT, Display, FailOnChoice
from converter.cli.verbs.examining import Deep, Ignore

ForEach = Annotated[
    str | None,
    typer.Option("--for", metavar="TRAINER", help="Say what this loader does with each.", show_default=False),
]


class NotifyChoice(StrEnum):
    """How changes are noticed."""

    auto = "auto"
    inotify = "inotify"
    poll = "poll"


@verb(
    "watch",
    Display,
    short_help="Examine each checkpoint of a run once it is complete.",
    help="Examine each checkpoint of a run with doctor, once, as soon as it is complete, and print a line each. What "
    "is being written is not read. A restart repeats nothing. With --json: one object a line.",
    examples=(
        "rlhf-convert watch ./run",
        "rlhf-convert watch ./run --for openrlhf --on-error 'notify-send {}'",
        "rlhf-convert watch ./run --once --keep-sole-copies --json",
    ),
)
def watch(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Folder that gets checkpoints.", show_default=False)],
    options: Display,
    target: ForEach = None,
    deep: Deep = False,
    ignore: Ignore = None,
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
    post: Annotated[
        str | None,
        typer.Option(
            "--post",
            metavar="URL",
            help="Send what --json prints of each checkpoint there, as it is examined; the URL is never printed.",
            show_default=False,
        ),
    ] = None,
    keep_sole_copies: Annotated[
        bool,
        typer.Option(
            "--keep-sole-copies",
            help="Name the folders that must not be rotated away: the only copy of weights, and the newest checkpoint "
            "that can be used where a newer one is lost.",
        ),
    ] = False,
    notify: Annotated[
        NotifyChoice,
        typer.Option(
            "--notify",
            help="How changes are noticed: told by the kernel (needs the extra `watch`), or by looks at intervals.",
        ),
    ] = NotifyChoice.auto,
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
        ignore=ignore or (), interval=interval, settle=settle, state=state, post_to=post, notify=notify.value,
        keep_sole_copies=keep_sole_copies,
    )  # fmt: skip


class FormatChoice(StrEnum):
    """What a pipeline reads."""

    text = "text"
    json = "json"
    sarif = "sarif"
    junit = "junit"


@verb(
    "check",
    Display,
    short_help="Examine the checkpoints that files of a repository belong to.",
    help="Examine with doctor every checkpoint that files or folders belong to: in a pre-commit hook, a pipeline, an "
    "editor. A file stands for its folder, a folder for all checkpoints below it. Exit code 1 where one has a finding "
    "that counts.",
    examples=(
        "rlhf-convert check models/ adapters/",
        "rlhf-convert check . --format sarif --output findings.sarif",
        "rlhf-convert check ./run --format junit --fail-on error",
    ),
)
def check(
    paths: Annotated[list[str], typer.Argument(metavar="PATH...", help="Files and folders.", show_default=False)],
    options: Display,
    target: ForEach = None,
    deep: Deep = False,
    ignore: Ignore = None,
    fail_on: Annotated[
        FailOnChoice, typer.Option("--fail-on", help="The least severity that makes the exit code 1.")
    ] = FailOnChoice.changes_numbers,
    form: Annotated[
        FormatChoice, typer.Option("--format", help="What to print.", rich_help_panel=OUTPUT)
    ] = FormatChoice.text,
    output: Annotated[
        str | None,
        typer.Option(
            "--output", metavar="FILE", help="Write it here, not on stdout.", show_default=False, rich_help_panel=OUTPUT
        ),
    ] = None,
) -> int:
    """`rlhf-convert check`."""
    from converter.cli.tell.check import check

    return check(
        paths, fail_on.value, form.value, output, options, for_=target, deep=deep, ignore=ignore or (),
    )  # fmt: skip
