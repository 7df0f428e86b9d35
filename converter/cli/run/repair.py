"""`rlhf-convert repair`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from converter.cli import lines as report
from converter.cli.options import Conversion
from converter.cli.run.folder import convert
from converter.cli.run.planned import load_commands
from converter.diagnostic import Command, Next, as_argument, spelled
from converter.errors import ConvertError, Refused
from converter.recipe.recipe import SOURCE, Recipe
from converter.recipe.verbs.repair import (
    RepairRequest,
    expect_sound,
    is_whole,
    mend_recipe,
    mends_of,
    repair_recipe,
    shards_alone,
)
from converter.text import show

if TYPE_CHECKING:
    from converter.cli.run.planned import Written
    from converter.converters.fill.refusals import NothingToRepair
    from converter.core.checkpoint import Checkpoint
    from converter.recipe.run import Prepared
    from converter.recipe.verbs.repair_mends import Mends
    from converter.recipe.verbs.repair_places import Search


def repair(asked: RepairRequest, out: str | None, options: Conversion) -> int:
    """Fill what is lost, or say that nothing is; shards without any weight file are gathered."""
    from converter.converters.fill.refusals import NothingToRepair
    from converter.recipe.verbs.repair_mends import NEVER_FILLED
    from converter.recipe.verbs.repair_places import search
    from converter.sources.hub.names import as_reference
    from converter.sources.locate import resolve

    if options.revision is not None:
        asked = dataclasses.replace(asked, src=as_reference(asked.src, options.revision))
    root = resolve(asked.src, revision=options.revision, token=options.token, in_parts=True, whole=True).path
    found = search(asked.src, asked.weights_from, token=options.token)
    if (shards := shards_alone(root, asked, found)) is not None:
        return _gather(shards, asked, out, options)
    if asked.emit == "both":
        return _both(asked, found, out, options)
    mends = mends_of(asked, options.plain)
    recipe = repair_recipe(asked, found, options.plain, mends=mends.steps)

    def checked_lines(prepared: Prepared) -> list[str]:
        expect_sound(asked, mends, only=NEVER_FILLED)
        return [*input_lines(prepared), *_left(mends)]

    if options.print_recipe and mends.codes and is_whole(recipe, options.plain):
        recipe = mend_recipe(asked, mends, options.plain)  # `fill` would stop a run that has nothing to fill
    try:
        return convert(recipe, out, options, input_lines=checked_lines, next_commands=_next)
    except NothingToRepair as healthy:
        return _mend(asked, out, mends, options, healthy)
    except Refused as error:
        if found.looked and error.code in ("tensors-lost", "head-base-lost", "repair-mismatch", "older-weights"):
            error.got = (error.got or "nothing:") + "".join(f"\n    {each}" for each in found.looked)
        raise


def _both(asked: RepairRequest, found: Search, out: str | None, options: Conversion) -> int:
    """LoRA layers left in a full model: the merged model in OUT, the adapter in OUT-adapter."""
    from converter.cli.run.two_outputs import Split, write_both

    def recipe(emit: str) -> tuple[Recipe, str]:
        mends = mends_of(dataclasses.replace(asked, emit=emit), options.plain)
        filling = repair_recipe(asked, found, options.plain, mends=mends.steps)
        return (mend_recipe(asked, mends, options.plain) if is_whole(filling, options.plain) else filling), ""

    return write_both(Split(recipe, lambda prepared, _: _source(prepared), _next), out, options)


def _left(mends: Mends) -> list[str]:
    """What is not mended without consent, and what to consent to."""
    return [report.line("left", f"{show(code)}: {show(needed)}") for code, needed in mends.left]


def _mend(asked: RepairRequest, out: str | None, mends: Mends, options: Conversion, healthy: NothingToRepair) -> int:
    """Nothing is lost: mend what else doctor found, or say that the folder is sound."""
    sink = options.sink
    left = _left(mends)
    expect_sound(asked, mends)
    if mends.codes:
        recipe = mend_recipe(asked, mends, options.plain)
        found = report.line("mends", ", ".join(mends.codes))
        return convert(recipe, out, options, input_lines=lambda p: [*_source(p), found, *left], next_commands=_next)
    sink.screen([f"{show(asked.src)}: {healthy.what}", *left, str(healthy.next)])
    sink.json(
        {"healthy": not mends.left, "what": healthy.what, "advice": spelled(healthy.next), "left": list(mends.left)}
    )
    return 0


def _source(prepared: Prepared) -> list[str]:
    source = prepared.opened[SOURCE]
    kind = report.adapter_kind(source.config) if source.origin.kind == "adapter" else report.dtype_words(source)
    return [report.line("source", f"{show(source.origin.asked)}  {kind}")]


def _gather(shards: str, asked: RepairRequest, out: str | None, options: Conversion) -> int:
    from converter.cli.run.gather import gather
    from converter.recipe.verbs.gather import GatherRequest, gather_command

    request = GatherRequest(shards, base=asked.base)
    options.sink.tell(f"{show(asked.src)} has no weight file: this is `{Command('gather', (shards,))}`")
    try:
        return gather(request, out, options)
    except ConvertError as error:
        error.complete(gather_command(request, out))
        raise


def input_lines(prepared: Prepared) -> list[str]:
    """The screen's lines about the folder, and where each lost tensor comes from."""
    source, repaired = prepared.opened[SOURCE], prepared.checkpoint.repaired
    kind = report.adapter_kind(source.config) if source.origin.kind == "adapter" else report.dtype_words(source)
    lines = [report.line("broken", f"{show(source.origin.asked)}  {kind}, {_count(source)}")]
    lines += report.repaired_lines(repaired)
    return lines


def _count(source: Checkpoint) -> str:
    every = list(source.all_tensors())
    return f"{sum(t.info.shape == (0,) for t in every)} of {len(every)} tensors empty"


def _next(written: Written) -> Sequence[Next]:
    """The check, then what loads the result."""
    if written.prepared.checkpoint.origin.kind != "adapter":
        return load_commands(written)
    base = written.prepared.checkpoint.config.get("base_model_name_or_path")
    named = [] if isinstance(base, str) and base else ["--base", "BASE"]
    out = as_argument(written.out)
    merge = Command("merge-lora", (out, f"{out.rstrip('/')}-merged", *named))
    return [Command("inspect", (out,)), merge]
