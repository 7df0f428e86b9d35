"""Verbs that talk to the Hub: names, arguments, help."""

from __future__ import annotations

from typing import Annotated

import typer

from converter.cli.app import verb
from converter.cli.options import CONSENT, HUB, OUTPUT, Reading, Token


@verb(
    "push",
    Reading,
    short_help="Push a folder to the Hub: checked before, compared after.",
    help="Push a folder to the Hub as one commit: doctor and the receipt are asked first, a card is made from the "
    "receipt, and what the Hub holds afterwards is compared by size and digest. Run it again after any failure.",
    examples=(
        "rlhf-convert push ./rm me/my-reward-model",
        "rlhf-convert push ./rm me/my-reward-model --dry-run",
        "rlhf-convert push ./rm me/my-reward-model --public --create-pr",
    ),
)
def push(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="Folder to push.", show_default=False)],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="owner/name on the Hub.", show_default=False)],
    options: Reading,
    token: Token = None,
    public: Annotated[
        bool, typer.Option("--public", help="Make a new repository public.", rich_help_panel=HUB)
    ] = False,
    revision: Annotated[str, typer.Option(metavar="REV", help="Branch to commit to.", rich_help_panel=HUB)] = "main",
    create_pr: Annotated[
        bool, typer.Option("--create-pr", help="Open a pull request instead of a commit.", rich_help_panel=HUB)
    ] = False,
    message: Annotated[
        str | None,
        typer.Option(
            "--commit-message", metavar="TEXT", help="Title of the commit.", show_default=False, rich_help_panel=HUB
        ),
    ] = None,
    keep_code: Annotated[
        bool, typer.Option("--keep-code", help="Push .py files too.", rich_help_panel=CONSENT)
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check and list; send nothing.", rich_help_panel=OUTPUT)
    ] = False,
    allow: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CODE",
            help="Go on where CODE was refused; the card says so.",
            show_default=False,
            rich_help_panel=CONSENT,
        ),
    ] = None,
) -> int:
    """`rlhf-convert push`."""
    from converter.cli.run.push import push

    return push(
        folder, repo, options, token=token, public=public, revision=revision, create_pr=create_pr,
        commit_message=message, keep_code=keep_code, dry_run=dry_run, allow=allow or (),
        allow_name=options.allow_name or (),
    )  # fmt: skip
