"""`rlhf-convert gather`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from converter.cli.options import Conversion
from converter.cli.run.folder import convert
from converter.cli.run.two_outputs import Split, write_both
from converter.diagnostic import Command, Next, Steps, as_argument
from converter.errors import ConvertError
from converter.recipe.recipe import SOURCE
from converter.recipe.verbs.gather import GatherRequest, gather_recipe, with_masters
from converter.recipe.verbs.run_state import with_recorded_base
from converter.text import show

if TYPE_CHECKING:
    from converter.cli.run.planned import Written
    from converter.recipe.run import Prepared


def gather(asked: GatherRequest, out: str | None, options: Conversion) -> int:
    """Gather a trainer's shards into a model or an adapter."""
    options = dataclasses.replace(options, dtype=with_masters(asked, options.dtype))

    def attempt(recorded: bool) -> int:
        return _gather(dataclasses.replace(asked, recorded=recorded), out, options)

    try:
        return with_recorded_base(attempt, given=asked.base is not None)
    except ConvertError as error:
        if error.code == "lora-alpha-unknown":
            error.next = Steps(error.next, ", and --rslora if it set use_rslora")
        raise


def _gather(asked: GatherRequest, out: str | None, options: Conversion) -> int:
    if asked.emit == "both":
        return gather_both(asked, out, options)
    recipe, said = gather_recipe(asked, options.plain)
    return convert(
        recipe,
        out,
        options,
        input_lines=lambda prepared: input_lines(prepared, said),
        next_commands=lambda w: next_commands(w, asked),
    )


def input_lines(prepared: Prepared, said: str) -> list[str]:
    """The screen's lines about the shards, the tag that was chosen, and the base."""
    from converter.cli import lines as report

    source = prepared.opened[SOURCE]
    words = report.dtype_words(source)
    lines = [report.line("shards", f"{show(source.origin.asked)}  {source.origin.stored_format}, {words}")]
    if said:
        lines.append(report.line("", said))
    if "base" in prepared.opened:
        lines.append(report.base_line("base", prepared.opened["base"], recorded="base" in prepared.recorded))
    return lines


def next_commands(written: Written, asked: GatherRequest) -> Sequence[Next]:
    """The check, then what loads the result."""
    from converter.cli.run.planned import load_commands

    if written.prepared.checkpoint.origin.kind != "adapter":
        return load_commands(written)
    out = as_argument(written.out)
    base = written.prepared.checkpoint.config.get("base_model_name_or_path")
    named = [] if isinstance(base, str) and base and asked.base is None else ["--base", asked.base or "BASE"]
    merge = Command("merge-lora", (out, f"{out.rstrip('/')}-merged", *named))
    return [Command("inspect", (out,)), merge]


def gather_both(asked: GatherRequest, out: str | None, options: Conversion) -> int:
    """Gather the model and the adapter."""
    split = Split(
        lambda emit: gather_recipe(dataclasses.replace(asked, emit=emit), options.plain),
        input_lines,
        lambda written: next_commands(written, asked),
    )
    return write_both(split, out, options)
