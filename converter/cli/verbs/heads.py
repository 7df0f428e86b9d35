"""Verbs that turn a model of one trainer into one of another: `convert` and its two presets."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated

import typer

from converter.cli.app import Out, verb
from converter.cli.options import Conversion, PartChoice


class RoleChoice(StrEnum):
    """What a trainer uses a model as."""

    reward = "reward"
    critic = "critic"
    actor = "actor"


class BiasChoice(StrEnum):
    """What happens to a constant of the head that the target has no place for."""

    refuse = "refuse"
    drop = "drop"
    into_mean = "into-mean"


class NormaliserChoice(StrEnum):
    """What happens to mean and std where the target can't keep them."""

    fold = "fold"
    drop = "drop"


class InitChoice(StrEnum):
    """How a fresh head begins."""

    zeros = "zeros"
    normal = "normal"


@dataclass(frozen=True)
class Remapping(Conversion):
    """Options of the verbs that write a head."""

    source: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="NAME",
            help="Trainer or dialect of SRC; default: told from its files.",
            show_default=False,
        ),
    ] = None
    base: Annotated[
        str | None,
        typer.Option(
            metavar="BASE",
            help="Base of an adapter, or where a missing lm_head is; default: as recorded.",
            show_default=False,
        ),
    ] = None
    weights_from: Annotated[
        list[str] | None,
        typer.Option(
            metavar="DIR", help="Where tensors that SRC has lost may still be. Repeatable.", show_default=False
        ),
    ] = None
    part: Annotated[
        PartChoice | None,
        typer.Option(help="Which model, where SRC is a trainer's state that holds several.", show_default=False),
    ] = None
    tag: Annotated[
        str | None, typer.Option(metavar="T", help="Which checkpoint of a run; default: `latest`.", show_default=False)
    ] = None
    lora_alpha: Annotated[
        float | None,
        typer.Option(metavar="N", help="lora_alpha of training, where no config records it.", show_default=False),
    ] = None
    bias: Annotated[BiasChoice, typer.Option(help="A constant of the head that the target has no place for.")] = (
        BiasChoice.refuse
    )
    normaliser: Annotated[NormaliserChoice, typer.Option(help="mean and std: folded into the head, or left out.")] = (
        NormaliserChoice.fold
    )
    label: Annotated[
        int | None, typer.Option(metavar="N", help="Take this row of a head with several.", show_default=False)
    ] = None
    label_weights: Annotated[
        str | None,
        typer.Option(metavar="W,W,...", help="Sum the rows of a head with these weights, as -1,1.", show_default=False),
    ] = None
    init_head: Annotated[
        InitChoice | None,
        typer.Option(help="A fresh head where SRC has none; it has learnt nothing.", show_default=False),
    ] = None
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Of --init-head normal.")] = 0


Src = Annotated[
    str,
    typer.Argument(metavar="SRC", help="Model, adapter, run folder or Hub id.", show_default=False),
]
To = Annotated[str, typer.Option("--to", metavar="TRAINER[@VERSION]", help="Who is to read it.", show_default=False)]


@verb(
    "convert",
    Remapping,
    short_help="Make a model of one trainer into one of another.",
    help="Make a reward model, critic or actor of one trainer into one of another, whatever SRC is: a model, a LoRA "
    "adapter, a run of DeepSpeed, FSDP or verl. Gathered, merged and remapped in one pass.",
    examples=(
        "rlhf-convert convert ./rm ./critic --to verl --role critic",
        "rlhf-convert convert ./my-adapter ./rm --to openrlhf --role reward --base Qwen/Qwen2.5-7B",
        "rlhf-convert convert ./run ./policy --to trl --role actor --part actor",
    ),
)
def convert(
    src: Src,
    options: Remapping,
    to: To,
    out: Out = None,
    role: Annotated[RoleChoice, typer.Option(help="What the trainer uses it as.")] = RoleChoice.critic,
) -> int:
    """`rlhf-convert convert`."""
    from converter.cli.run.convert import convert

    return convert(src, options.target(out), to, role.value, options)


@verb(
    "rm-to-critic",
    Remapping,
    short_help="Make a reward model into a critic.",
    help="Make a reward model of any trainer into the critic that another begins with. Shards without the head stay as "
    "they are, byte by byte.",
    examples=(
        "rlhf-convert rm-to-critic ./rm ./critic --to openrlhf",
        "rlhf-convert rm-to-critic ./rm ./critic --to verl --from llamafactory",
        "rlhf-convert rm-to-critic ./rm-adapter ./critic --to openrlhf@0.5.2 --base Qwen/Qwen2.5-7B",
    ),
)
def rm_to_critic(src: Src, options: Remapping, to: To, out: Out = None) -> int:
    """`rlhf-convert rm-to-critic`."""
    from converter.cli.run.convert import convert

    return convert(src, options.target(out), to, "critic", options, verb="rm-to-critic")


@verb(
    "critic-to-rm",
    Remapping,
    short_help="Make a critic into a reward model.",
    help="Make a critic, or a reward model, of any trainer into a reward model of another.",
    examples=(
        "rlhf-convert critic-to-rm ./critic ./rm --to trl",
        "rlhf-convert critic-to-rm ./critic ./rm --to vllm --bias drop",
        "rlhf-convert critic-to-rm ./two-label-rm ./rm --to openrlhf --label-weights=-1,1",
    ),
)
def critic_to_rm(src: Src, options: Remapping, to: To, out: Out = None) -> int:
    """`rlhf-convert critic-to-rm`."""
    from converter.cli.run.convert import convert

    return convert(src, options.target(out), to, "reward", options, verb="critic-to-rm")
