"""The verb `run`: any recipe."""

from __future__ import annotations

from typing import Annotated

import typer

from converter.cli.app import Out, verb
from converter.cli.options import INPUT, Conversion


@verb(
    "run",
    Conversion,
    short_help="Run a recipe.",
    help="Run a recipe: a file, or the name of a shipped one (see `rlhf-convert list`).",
    examples=(
        "rlhf-convert run ./recipe.yaml ./out",
        "rlhf-convert run merge-reward-lora ./rm --input adapter=./my-adapter",
        "srun -n 8 rlhf-convert run ./recipe.yaml ./out --task auto",
    ),
)
def run(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="YAML file or shipped name.", show_default=False)],
    options: Conversion,
    out: Out = None,
    given: Annotated[
        list[str] | None,
        typer.Option(
            "--input",
            metavar="NAME=PATH",
            help="Path of one of the recipe's inputs. Repeatable.",
            show_default=False,
            rich_help_panel=INPUT,
        ),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            "--task",
            metavar="K/N|auto",
            help="Write the K-th of N shares of the files: N processes, on one file system, make one output, and the "
            "last one publishes it. auto: as SLURM, torchrun, MPI or Kubernetes say (auto/N where they say no number).",
            show_default=False,
        ),
    ] = None,
) -> int:
    """`rlhf-convert run`."""
    from converter.cli.run.recipe import run

    return run(recipe, tuple(given or ()), options.target(out), options, task)
