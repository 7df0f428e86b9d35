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


@verb(
    "make-delta",
    Conversion,
    short_help="Write the difference of two models.",
    help="Write what training added to a base, a task vector: TUNED - BASE in fp32, tensor by tensor, streamed. Models "
    "that differ in more than values are refused. The folder is no model: apply-delta adds it to one.",
    examples=(
        "rlhf-convert make-delta Qwen/Qwen2.5-7B ./dpo ./dpo-delta",
        "rlhf-convert make-delta ./base ./tuned ./delta --dtype bf16",
        "rlhf-convert make-delta ./base ./tuned ./delta --dry-run",
    ),
)
def make_delta(
    base: Annotated[
        str, typer.Argument(metavar="BASE", help="The model that training began with.", show_default=False)
    ],
    tuned: Annotated[str, typer.Argument(metavar="TUNED", help="The model that came out of it.", show_default=False)],
    options: Conversion,
    out: Out = None,
) -> int:
    """`rlhf-convert make-delta`."""
    from converter.cli.run.delta import make_delta

    return make_delta(base, tuned, options.target(out), options)


@verb(
    "apply-delta",
    Conversion,
    short_help="Write a model plus differences of models.",
    help="Write a model plus one or more differences that make-delta wrote, each times a weight. Summed in fp64, "
    "rounded once to the model's own dtypes, streamed; the model's side files are kept.",
    examples=(
        "rlhf-convert apply-delta ./base ./dpo-delta ./dpo",
        "rlhf-convert apply-delta ./sft ./dpo-delta ./code-delta ./both --weight 0.5 --weight 0.3",
        "rlhf-convert apply-delta ./tuned ./toxic-delta ./without --weight -1",
    ),
)
def apply_delta(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="BASE DELTA ... OUT", help="A model, differences, then the folder to write.", show_default=False
        ),
    ],
    options: Conversion,
    weight: Annotated[
        list[float] | None,
        typer.Option(
            metavar="W", help="Factor of each difference, in order; default: 1. Repeatable.", show_default=False
        ),
    ] = None,
) -> int:
    """`rlhf-convert apply-delta`."""
    from converter.cli.run.delta import apply_delta

    base, *rest = paths
    named = options.out_option is None
    deltas, out = (rest[:-1], rest[-1] if rest else None) if named else (rest, None)
    return apply_delta(base, deltas, weight or (), options.target(out), options)
