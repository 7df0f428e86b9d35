"""Verbs that make an adapter: names, arguments, help."""

from __future__ import annotations

from typing import Annotated

import typer

from converter.cli.app import Out, verb
from converter.cli.options import Conversion


@verb(
    "extract-lora",
    Conversion,
    short_help="Write the LoRA adapter that a tuned model is of its base.",
    help="Write the LoRA adapter that a tuned model is of its base: each matrix that changed gets the best pair of "
    "factors at a rank, and the receipt says how much of the change it keeps. Heads, embeddings and norms that "
    "changed are kept whole. PEFT loads it and trains on.",
    examples=(
        "rlhf-convert extract-lora Qwen/Qwen2.5-7B ./tuned ./adapter --rank 64",
        "rlhf-convert extract-lora ./base ./tuned ./adapter --energy 0.99",
        "rlhf-convert extract-lora ./base ./tuned ./adapter --rank 16 --dtype bf16",
    ),
)
def extract_lora(
    base: Annotated[
        str, typer.Argument(metavar="BASE", help="The model that training began with.", show_default=False)
    ],
    tuned: Annotated[str, typer.Argument(metavar="TUNED", help="The model that came out of it.", show_default=False)],
    options: Conversion,
    out: Out = None,
    rank: Annotated[
        int | None, typer.Option("--rank", metavar="R", help="Rank of every pair of factors.", show_default=False)
    ] = None,
    energy: Annotated[
        float | None,
        typer.Option(
            "--energy",
            metavar="E",
            help="In place of a rank: the share of each change's squared norm to keep.",
            show_default=False,
        ),
    ] = None,
) -> int:
    """`rlhf-convert extract-lora`."""
    from converter.cli.run.adapters import extract_lora

    return extract_lora(base, tuned, options.target(out), rank, energy, options)


@verb(
    "prune-lora",
    Conversion,
    short_help="Write a LoRA adapter at a lower rank.",
    help="Write a LoRA adapter at a lower rank: each pair of factors becomes the best one of that rank, every scale "
    "stays what it was, and the receipt says how much of each update is kept.",
    examples=(
        "rlhf-convert prune-lora ./adapter ./small --rank 8",
        "rlhf-convert prune-lora ./adapter ./small --rank 16 --dtype bf16",
        "rlhf-convert prune-lora ./adapter ./small --rank 4 --dry-run",
    ),
)
def prune_lora(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="Adapter folder or Hub id.", show_default=False)],
    options: Conversion,
    out: Out = None,
    *,
    rank: Annotated[
        int, typer.Option("--rank", metavar="R", help="Of every pair that has a larger one.", show_default=False)
    ],
) -> int:
    """`rlhf-convert prune-lora`."""
    from converter.cli.run.adapters import prune_lora

    return prune_lora(adapter, options.target(out), rank, options)


@verb(
    "convert-lora",
    Conversion,
    short_help="Write a LoRA adapter as another program reads it.",
    help="Write a LoRA adapter as another program reads it: names, one pair for each expert or one for all, a single "
    "rank and scale, mlx-lm's files. It reads PEFT's, mlx-lm's and Tinker's. Every update is what it was; what the "
    "program has no place for is refused by name.",
    examples=(
        "rlhf-convert convert-lora ./adapter ./for-vllm --for vllm",
        "rlhf-convert convert-lora ./moe-adapter ./old --for peft@0.13 --base Qwen/Qwen3-30B-A3B",
        "rlhf-convert convert-lora ./mlx-adapter ./adapter --for peft",
    ),
)
def convert_lora(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="Adapter folder or Hub id.", show_default=False)],
    options: Conversion,
    out: Out = None,
    *,
    target: Annotated[
        str,
        typer.Option(
            "--for", metavar="PROGRAM", help="peft, peft@0.13, transformers@4, vllm, mlx or tinker.", show_default=False
        ),
    ],
    base: Annotated[
        str | None,
        typer.Option(metavar="BASE", help="The model that it is over; for factors of experts.", show_default=False),
    ] = None,
) -> int:
    """`rlhf-convert convert-lora`."""
    from converter.cli.run.adapters import convert_lora

    return convert_lora(adapter, options.target(out), target, base, options)
