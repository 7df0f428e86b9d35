"""The verb `run`: any recipe."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from converter.cli.app import Out, verb
from converter.cli.options import INPUT, RESOURCES, Conversion


class ExecutorChoice(StrEnum):
    """Where files are written."""

    ray = "ray"


@verb(
    "run",
    Conversion,
    short_help="Run a recipe.",
    help="Run a recipe: a file, or the name of a shipped one (see `rlhf-convert list`).",
    examples=(
        "rlhf-convert run merge-reward-lora ./rm --input adapter=./my-adapter",
        "srun -n 8 rlhf-convert run ./recipe.yaml ./out --task auto",
        "rlhf-convert run ./recipe.yaml ./out --executor ray --ray-address head:6379",
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
    executor: Annotated[
        ExecutorChoice | None,
        typer.Option(
            help="ray: write each file in a task of a Ray cluster, whose machines share the file system.",
            show_default=False,
            rich_help_panel=RESOURCES,
        ),
    ] = None,
    ray_address: Annotated[
        str | None,
        typer.Option(
            metavar="A",
            help="Head of the Ray cluster; default: RAY_ADDRESS, else the one on this machine, else a new one.",
            show_default=False,
            rich_help_panel=RESOURCES,
        ),
    ] = None,
    ray_resource: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Use machines with this custom resource only, for example those with the inputs on their own disk.",
            show_default=False,
            rich_help_panel=RESOURCES,
        ),
    ] = None,
) -> int:
    """`rlhf-convert run`."""
    from converter.cli.run.recipe import Spread, run

    spread = Spread(task, executor is ExecutorChoice.ray, ray_address, ray_resource)
    return run(recipe, tuple(given or ()), options.target(out), options, spread)
