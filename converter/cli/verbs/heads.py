"""Verbs that turn a model of one trainer into one of another: `convert` and its two presets."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from converter.cli.app import Out, verb
from converter.cli.options import HeadFlags


class RoleChoice(StrEnum):
    """What a trainer uses a model as."""

    reward = "reward"
    critic = "critic"
    actor = "actor"


Src = Annotated[
    str,
    typer.Argument(metavar="SRC", help="Model, adapter, run folder or Hub id.", show_default=False),
]
To = Annotated[str, typer.Option("--to", metavar="TRAINER[@VERSION]", help="Who is to read it.", show_default=False)]


@verb(
    "convert",
    HeadFlags,
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
    options: HeadFlags,
    to: To,
    out: Out = None,
    role: Annotated[RoleChoice, typer.Option(help="What the trainer uses it as.")] = RoleChoice.critic,
) -> int:
    """`rlhf-convert convert`."""
    from converter.cli.run.convert import convert
    from converter.recipe.verbs.convert import ConvertRequest

    return convert(ConvertRequest(src, to, role.value), options.target(out), options)


@verb(
    "rm-to-critic",
    HeadFlags,
    short_help="Make a reward model into a critic.",
    help="Make a reward model of any trainer into the critic that another begins with. Shards without the head stay as "
    "they are, byte by byte.",
    examples=(
        "rlhf-convert rm-to-critic ./rm ./critic --to openrlhf",
        "rlhf-convert rm-to-critic ./rm ./critic --to verl --from llamafactory",
        "rlhf-convert rm-to-critic ./rm-adapter ./critic --to openrlhf@0.5.2 --base Qwen/Qwen2.5-7B",
    ),
)
def rm_to_critic(src: Src, options: HeadFlags, to: To, out: Out = None) -> int:
    """`rlhf-convert rm-to-critic`."""
    from converter.cli.run.convert import convert
    from converter.recipe.verbs.convert import ConvertRequest

    return convert(ConvertRequest(src, to, "critic", "rm-to-critic"), options.target(out), options)


@verb(
    "critic-to-rm",
    HeadFlags,
    short_help="Make a critic into a reward model.",
    help="Make a critic, or a reward model, of any trainer into a reward model of another.",
    examples=(
        "rlhf-convert critic-to-rm ./critic ./rm --to trl",
        "rlhf-convert critic-to-rm ./critic ./rm --to vllm --bias drop",
        "rlhf-convert critic-to-rm ./two-label-rm ./rm --to openrlhf --label-weights=-1,1",
    ),
)
def critic_to_rm(src: Src, options: HeadFlags, to: To, out: Out = None) -> int:
    """`rlhf-convert critic-to-rm`."""
    from converter.cli.run.convert import convert
    from converter.recipe.verbs.convert import ConvertRequest

    return convert(ConvertRequest(src, to, "reward", "critic-to-rm"), options.target(out), options)
