"""The verb `reshard`: a model in other files, a run's state for other ranks."""

from __future__ import annotations

from typing import Annotated

import typer

from converter.cli.app import Out, verb
from converter.cli.options import INPUT, OUTPUT, Conversion, Dequantize
from converter.errors import UsageError

_STAGE = "Write a run's state for this stage of ZeRO; 0: one file, without ZeRO."


@verb(
    "reshard",
    Conversion,
    short_help="Rewrite a model in other files, a run for other ranks.",
    help="Rewrite a model folder in other files or another dtype; names, values and side files are kept. With "
    "--world-size: rewrite the state of a DeepSpeed run (ZeRO-1, 2, 3) or of verl (FSDP) so that training goes on with "
    "another number of ranks, with its masters, optimizer states, steps, schedules and client state, bit by bit.",
    examples=(
        "rlhf-convert reshard ./model ./model-2gb --max-shard-size 2GB",
        "rlhf-convert reshard ./run/checkpoint-500 ./checkpoint-500-on-4 --world-size 4",
        "rlhf-convert reshard ./model ./model-dcp --to dcp --under app.model",
    ),
)
def reshard(
    src: Annotated[
        str,
        typer.Argument(
            metavar="SRC",
            help="Model folder or Hub id; with --world-size a folder of shards, its parent, or the run's.",
            show_default=False,
        ),
    ],
    options: Conversion,
    out: Out = None,
    dequantize: Dequantize = False,
    world_size: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Write a run's state for N data-parallel ranks.", show_default=False),
    ] = None,
    stage: Annotated[
        int | None,
        typer.Option("--stage", "--zero", metavar="0|1|2|3", min=0, max=3, help=_STAGE, show_default=False),
    ] = None,
    tag: Annotated[
        str | None,
        typer.Option(
            metavar="T",
            help="Which checkpoint of the run; default: what `latest` says.",
            show_default=False,
            rich_help_panel=INPUT,
        ),
    ] = None,
    to: Annotated[
        str | None,
        typer.Option(
            metavar="dcp|universal|full|sharded",
            help="dcp: a model as a torch distributed checkpoint; universal: a DeepSpeed run as its universal one; "
            "full, sharded: what accelerate saved under FSDP in the other layout.",
            show_default=False,
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    under: Annotated[
        str | None,
        typer.Option(
            metavar="KEYS",
            help="Dictionaries that it has the model in: model (default; NeMo-RL), app.model (slime), . for none.",
            show_default=False,
            rich_help_panel=OUTPUT,
        ),
    ] = None,
) -> int:
    """`rlhf-convert reshard`."""
    is_state = world_size is not None or stage is not None or to in ("universal", "full", "sharded")
    flags = {"--dequantize": dequantize, "--to dcp": to == "dcp", "--under": under is not None}
    if is_state and (wrong := [flag for flag, is_given in flags.items() if is_given]):
        what = f"{wrong[0]} rewrites a model; --world-size, --stage and --to {to or 'universal'} rewrite a run's state"
        raise UsageError("usage", what)
    if is_state:
        from converter.cli.run.reshard_state import reshard_state
        from converter.recipe.verbs.reshard_state import ReshardRequest

        return reshard_state(ReshardRequest(src, world_size, tag, stage, to), options.target(out), options)
    if tag is not None:
        raise UsageError("usage", "--tag names a checkpoint of a run, and goes with --world-size or --stage")
    from converter.cli.run.reshard import reshard

    return reshard(src, options.target(out), options, dequantize=dequantize, to=to, under=under)
