"""`rlhf-convert reshard --world-size`: the screen around a trainer's state that is cut for other ranks."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING

from converter.cli.lines import checked_line, files_json, line, needs_line, next_lines, shards_line
from converter.cli.options import Conversion
from converter.cli.progress import progress
from converter.cli.run.planned import missing_output
from converter.core.writer import preflight
from converter.core.writer.write import write
from converter.diagnostic import Command, Next, as_argument
from converter.errors import Interrupted, UsageError
from converter.publish.outputs import as_loaders_take_it, goes_to_hub
from converter.recipe.verbs.pieces import threads
from converter.recipe.verbs.reshard_state import TRAINER_STATE, ReshardRequest, plan_state
from converter.text import parse_size, show

if TYPE_CHECKING:
    from converter.core.writer.write import Receipt
    from converter.sources.deepspeed.resharding.plan import Resharded

_NOT_HERE = {
    "--print-recipe": "print_recipe", "--dtype": "dtype", "--max-shard-size": "max_shard_size", "--layout": "layout",
    "--link-unchanged": "link_unchanged", "--push-to-hub": "push_to_hub",
}  # fmt: skip


def reshard_state(asked: ReshardRequest, out: str | None, options: Conversion) -> int:
    """Write a trainer's state for another number of ranks."""
    _expect_options(out, options)
    target = None if out is None else Path(out).expanduser()
    memory = None if options.memory is None else parse_size(options.memory, what="--memory")
    if target is not None:
        preflight.check_target(target, (), overwrite=options.overwrite)
    made = plan_state(asked, revision=options.revision, token=options.token, keep_code=options.keep_code)
    _show_plan(asked, made, target, options)
    if options.dry_run:
        preflight.memory_limit(made.plan, memory)
        if target is not None:
            preflight.check_target(target, made.plan.inputs, overwrite=options.overwrite)
            preflight.check_space(made.plan, target)
        options.sink.screen(["dry run: nothing written"])
        options.sink.json({"dry_run": True, **_facts(made), "files": files_json(made.plan)})
        return 0
    assert target is not None
    assert out is not None
    receipt = _write(made, target, memory, options)
    _finish(made, receipt, out, options)
    return 0


def _expect_options(out: str | None, options: Conversion) -> None:
    wrong = [flag for flag, field in _NOT_HERE.items() if getattr(options, field)]
    if wrong:
        raise UsageError("usage", f"{wrong[0]} has no meaning with --world-size: a trainer's state is kept as it is")
    if out is None and not options.dry_run:
        raise missing_output()
    if goes_to_hub(out):
        raise UsageError("usage", "a trainer's state is written to a folder, and not to the Hub")


def _show_plan(asked: ReshardRequest, made: Resharded, target: Path | None, options: Conversion) -> None:
    plan, sink = made.plan, options.sink
    sink.screen([line("state", f"{show(asked.src)}  {made.format_before}")])
    sink.screen([line("", text) for text in made.said])
    count = len(plan.shards)
    sink.screen([line("plan", f"{made.tag}: {count} files for {made.ranks} {'rank' if made.ranks == 1 else 'ranks'}")])
    free = None if target is None else preflight.free_bytes(target)
    needed = preflight.needed_memory(plan, options.jobs or threads())
    sink.screen([needs_line(plan.total_bytes, free, needed)])


def _write(made: Resharded, out: Path, memory: int | None, options: Conversion) -> Receipt:
    """Write what was planned.

    Raises:
        Interrupted: a signal came; nothing is published.
    """
    try:
        with progress(options.sink) as reporter:
            return write(
                made.plan,
                out,
                jobs=options.jobs or threads(),
                memory=memory,
                overwrite=options.overwrite,
                resume=not options.no_resume,
                verify=not options.no_verify,
                reporter=reporter,
            )
    except KeyboardInterrupt as stop:
        number = stop.args[0] if stop.args else signal.SIGINT
        raise Interrupted(number, "interrupted, nothing published: the same command again goes on") from None


def _facts(made: Resharded) -> dict[str, object]:
    return {
        "tag": made.tag,
        "stage": made.stage,
        "ranks_before": made.ranks_before,
        "ranks": made.ranks,
        "total_bytes": made.plan.total_bytes,
        "said": list(made.said),
    }


def _finish(made: Resharded, receipt: Receipt, out: str, options: Conversion) -> None:
    plan, sink = made.plan, options.sink
    count = len(plan.shards)
    commands = _next_commands(made, out)
    sink.screen([shards_line(count, count, plan.total_bytes, receipt.seconds)])
    sink.screen([checked_line(receipt.reread, receipt.recomputed, receipt.measures)])
    sink.screen([line("wrote", f"{show(out)}  {made.format_after}")])
    if made.batch:
        sink.screen([line("batch", made.batch)])
    sink.screen(next_lines(commands))
    sink.json(
        {
            "out": out,
            **_facts(made),
            "receipt": dict(receipt.content),
            "seconds": round(receipt.seconds, 3),
            "next": list(map(str, commands)),
        }
    )


def _next_commands(made: Resharded, out: str) -> list[Next]:
    """The check, then how the trainer is told to go on from there."""
    path = as_loaders_take_it(out)
    goes_on = (
        f"your launch line on {made.ranks} ranks with --resume_from_checkpoint {path}"
        if TRAINER_STATE in made.plan.side_files
        else f'on {made.ranks} ranks: engine.load_checkpoint("{path}")'
    )
    return [Command("inspect", (as_argument(out),)), goes_on]
