"""`rlhf-convert gather`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from converter.blanks import new_name
from converter.cli import lines as report
from converter.cli.options import Conversion as Flags
from converter.cli.run.folder import convert
from converter.cli.run.planned import load_commands
from converter.core.checkpoint import STATE
from converter.diagnostic import Command, Next, as_argument
from converter.errors import UsageError
from converter.publish.outputs import as_loaders_take_it
from converter.recipe.recipe import SOURCE
from converter.recipe.verbs import gather as verb
from converter.recipe.verbs.gather import Gathered, GatherRequest, gather_recipe, with_masters
from converter.text import show

if TYPE_CHECKING:
    from converter.recipe.recipe import Recipe


def gather(asked: GatherRequest, out: str | None, options: Flags) -> int:
    """Gather a trainer's shards into a model or an adapter."""
    if asked.emit == "both":
        expect_one_use(options)

    def recipe() -> Recipe:
        return gather_recipe(asked, dataclasses.replace(options.plain, dtype=with_masters(asked, options.dtype)))[0]

    own = functools.partial(
        verb.gather, asked.src, out, tag=asked.tag, base=asked.base, master=asked.master, emit=asked.emit,
        part=asked.part, lora_alpha=asked.lora_alpha, rslora=asked.rslora, dequantize=asked.dequantize,
    )  # fmt: skip
    convert(own, out, options, recipe=recipe, input_lines=input_lines, next_commands=next_commands)
    return 0


def expect_one_use(options: Flags) -> None:
    """What goes with one output only.

    Raises:
        UsageError: a recipe or a repository is asked of two outputs (`usage`).
    """
    if options.print_recipe:
        what = "two outputs are two recipes"
        raise UsageError("usage", what, expected="--print-recipe with --emit merged, or with --emit adapter")
    if options.push_to_hub is not None:
        what = "two outputs are two places"
        raise UsageError("usage", what, expected="--emit merged or --emit adapter, once for each place")


def input_lines(planned: Gathered) -> list[str]:
    """The screen's lines about the shards, the tag that was chosen, and the base."""
    opened, recorded = planned.prepared.opened, planned.prepared.recorded
    source = opened[SOURCE]
    words = report.dtype_words(source)
    lines = [report.line("shards", f"{show(source.origin.asked)}  {source.origin.stored_format}, {words}")]
    if planned.said:
        lines.append(report.line("", planned.said))
    if "base" in opened:
        lines.append(report.base_line("base", opened["base"], recorded="base" in recorded))
    return lines


def next_commands(done: Gathered) -> Sequence[Next]:
    """The check, then what loads the result."""
    if done.checkpoint.origin.kind == STATE:
        path = as_loaders_take_it(str(done.out))
        if len(done.plan.shards) > 1:
            return [Command("inspect", (as_argument(str(done.out)),))]
        loads = f"from safetensors.torch import load_file; print(load_file({f'{path}/{STATE}.safetensors'!r}).keys())"
        return [Command("", ("-c", loads), program="python")]
    if done.checkpoint.origin.kind != "adapter":
        return load_commands(done)
    out = as_argument(str(done.out))
    base = done.checkpoint.config.get("base_model_name_or_path")
    named = [] if done.base is None else ["--base", done.base]
    merge = (
        [Command("merge-lora", (out, new_name(out, "merged"), *named))]
        if named or (isinstance(base, str) and base)
        else []
    )
    return [Command("inspect", (out,)), *merge]
