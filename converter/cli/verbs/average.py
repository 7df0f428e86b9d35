"""Verbs that make one model of several: names, arguments, help."""

from __future__ import annotations

from typing import Annotated

import typer

from converter.cli.app import Out, verb
from converter.cli.options import Conversion


@verb(
    "average",
    Conversion,
    short_help="Write the weighted mean of models.",
    help="Write the weighted mean of models that differ in values only: reward models of several seeds, the last "
    "checkpoints of a run. Summed in fp64, rounded once, streamed; the first one's side files are kept.",
    examples=(
        "rlhf-convert average ./rm-seed-1 ./rm-seed-2 ./rm-seed-3 ./rm",
        "rlhf-convert average ./checkpoint-400 ./checkpoint-500 --out ./mean --weight 1 --weight 3",
        "rlhf-convert average ./a ./b ./mean --dry-run",
    ),
)
def average(
    paths: Annotated[
        list[str], typer.Argument(metavar="A B ... OUT", help="Models, then the folder to write.", show_default=False)
    ],
    options: Conversion,
    weight: Annotated[
        list[float] | None,
        typer.Option(
            metavar="W", help="Weight of each model, in order, divided by their sum. Repeatable.", show_default=False
        ),
    ] = None,
) -> int:
    """`rlhf-convert average`."""
    from converter.cli.run.average import average

    named = options.out_option is None
    models, out = (paths[:-1], paths[-1]) if named else (paths, None)
    return average(models, weight or (), options.target(out), options)


@verb(
    "interpolate",
    Conversion,
    short_help="Write a model between two models.",
    help="Write (1 - t) * A + t * B of two models that differ in values only. Summed in fp64, rounded once, streamed; "
    "A's side files are kept.",
    examples=(
        "rlhf-convert interpolate ./sft ./dpo ./between",
        "rlhf-convert interpolate ./sft ./dpo ./mostly-sft --t 0.25",
        "rlhf-convert interpolate ./sft ./dpo ./beyond --t 1.2",
    ),
)
def interpolate(
    a: Annotated[str, typer.Argument(metavar="A", help="The model at 0.", show_default=False)],
    b: Annotated[str, typer.Argument(metavar="B", help="The model at 1.", show_default=False)],
    options: Conversion,
    out: Out = None,
    t: Annotated[float, typer.Option("--t", metavar="T", help="Where between them.")] = 0.5,
) -> int:
    """`rlhf-convert interpolate`."""
    from converter.cli.run.average import average

    return average((a, b), (1.0 - t, t), options.target(out), options)
