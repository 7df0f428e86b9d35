"""`rlhf-convert repair`."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from converter.blanks import new_name
from converter.cli import lines as report
from converter.cli.options import Conversion as Flags
from converter.cli.run import gather
from converter.cli.run.folder import convert
from converter.cli.run.planned import load_commands
from converter.core.checkpoint import Checkpoint
from converter.diagnostic import Command, Next, as_argument, spelled
from converter.recipe.recipe import SOURCE
from converter.recipe.verbs import repair as verb
from converter.recipe.verbs.conversion import Conversion
from converter.recipe.verbs.gather import Gathered
from converter.recipe.verbs.repair import Repaired, RepairRequest, Sound, recipe_of
from converter.text import show


def repair(asked: RepairRequest, out: str | None, options: Flags) -> int:
    """Fill what is lost, or say that nothing is; shards without any weight file are gathered."""
    if asked.emit == "both":
        gather.expect_one_use(options)

    def lines(planned: Repaired | Gathered) -> list[str]:
        if isinstance(planned, Repaired):
            return input_lines(planned)
        shards = planned.prepared.opened[SOURCE].origin.asked
        options.sink.tell(f"{show(asked.src)} has no weight file: this is `{Command('gather', (shards,))}`")
        return gather.input_lines(planned)

    done = convert(
        of_request(asked, out), out, options,
        recipe=lambda: recipe_of(asked, options.plain), input_lines=lines, next_commands=_next,
    )  # fmt: skip
    if isinstance(done, Sound):
        without = [report.line("but", show(done.not_compared))] if done.not_compared else []
        options.sink.screen([f"{show(asked.src)}: {done.what}", *without, *_left(done.left), str(done.next)])
        advice = spelled(done.next)
        found = {"healthy": not done.left and not done.not_compared, "not_compared": done.not_compared or None}
        options.sink.json({**found, "what": done.what, "advice": advice, "left": list(done.left)})
    return 0


def of_request(asked: RepairRequest, out: str | None) -> functools.partial[Repaired | Gathered | Sound]:
    """The function with its own arguments."""
    return functools.partial(
        verb.repair, asked.src, out, weights_from=asked.weights_from, base=asked.base, for_=asked.target,
        lora_alpha=asked.lora_alpha, vocab=asked.vocab, set=asked.weights, emit=asked.emit,
    )  # fmt: skip


def _left(left: Sequence[tuple[str, str]]) -> list[str]:
    """What is not fixed without consent, and what to consent to."""
    return [report.line("left", f"{show(code)}: {show(needed)}") for code, needed in left]


def input_lines(planned: Repaired) -> list[str]:
    """The screen's lines about the folder, where each lost tensor comes from, and what is fixed beside."""
    source = planned.prepared.opened[SOURCE]
    kind = report.adapter_kind(source.config) if source.origin.kind == "adapter" else report.dtype_words(source)
    if planned.adapter is not None:
        return [report.line("source", f"{show(source.origin.asked)}  {kind}")]
    if planned.is_whole:
        lines = [report.line("source", f"{show(source.origin.asked)}  {kind}")]
        lines.append(report.line("fixes", ", ".join(planned.fixes.codes)))
    else:
        lines = [report.line("broken", f"{show(source.origin.asked)}  {kind}, {_count(source)}")]
        lines += report.repaired_lines(planned.checkpoint.repaired)
    return [*lines, *_left(planned.fixes.left)]


def _count(source: Checkpoint) -> str:
    every = list(source.all_tensors())
    return f"{sum(t.info.shape == (0,) for t in every)} of {len(every)} tensors empty"


def _next(done: Conversion) -> Sequence[Next]:
    """The check, then what loads the result."""
    if isinstance(done, Gathered):
        return gather.next_commands(done)
    if done.checkpoint.origin.kind != "adapter":
        return load_commands(done)
    base = done.checkpoint.config.get("base_model_name_or_path")
    out = as_argument(str(done.out))
    merge = [Command("merge-lora", (out, new_name(out, "merged")))] if isinstance(base, str) and base else []
    return [Command("inspect", (out,)), *merge]
