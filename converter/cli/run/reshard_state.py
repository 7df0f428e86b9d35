"""`rlhf-convert reshard --world-size`: the screen around a trainer's state that is cut for other ranks."""

from __future__ import annotations

from converter.cli.lines import checked_line, files_json, line, needs_line, next_lines, shards_line
from converter.cli.options import Conversion
from converter.cli.run.folder import running
from converter.cli.run.planned import missing_output
from converter.core.writer import preflight
from converter.diagnostic import Command, Next, as_argument
from converter.errors import UsageError
from converter.publish.outputs import as_loaders_take_it
from converter.recipe.verbs import reshard_state as verb
from converter.recipe.verbs.pieces import threads
from converter.recipe.verbs.reshard_state import ReshardedState, ReshardRequest
from converter.sources.resharded import Resharded
from converter.text import show


def reshard_state(asked: ReshardRequest, out: str | None, options: Conversion) -> int:
    """Write a trainer's state for another number of ranks."""
    without = {"--print-recipe": options.print_recipe, "--push-to-hub": options.push_to_hub, "--report": options.report}
    for flag, is_given in without.items():
        if is_given:
            raise UsageError("usage", f"{flag} has no meaning with --world-size: a trainer's state is kept as it is")
    if out is None and not options.dry_run:
        raise missing_output()

    with running(out, options) as reporter:

        def show_plan(planned: ReshardedState) -> None:
            reporter.hide()
            _show_plan(asked, planned, options)

        done = verb.reshard_state(
            asked.src,
            out,
            world_size=asked.world_size,
            stage=asked.stage,
            tag=asked.tag,
            to=asked.to,
            **options.knobs(reporter, show_plan),
        )
    if done.receipt is None:
        options.sink.screen(["dry run: nothing written"])
        options.sink.json({"dry_run": True, **_facts(done.made), "files": files_json(done.made.plan)})
    else:
        _finish(done, str(out), options)
    return 0


def _show_plan(asked: ReshardRequest, planned: ReshardedState, options: Conversion) -> None:
    made, sink = planned.made, options.sink
    sink.screen([line("state", f"{show(asked.src)}  {made.format_before}")])
    sink.screen([line("", text) for text in made.said])
    count = len(made.plan.shards)
    ranks = "1 rank" if made.ranks == 1 else f"{made.ranks or 'any number of'} ranks"
    sink.screen([line("plan", f"{made.tag}: {count} files for {ranks}")])
    free = None if planned.out is None else preflight.free_bytes(planned.out)
    needed = preflight.needed_memory(made.plan, options.jobs or threads())
    sink.screen([needs_line(made.plan.total_bytes, free, needed)])


def _facts(made: Resharded) -> dict[str, object]:
    return {
        "tag": made.tag,
        "stage": made.stage,
        "ranks_before": made.ranks_before,
        "ranks": made.ranks,
        "total_bytes": made.plan.total_bytes,
        "said": list(made.said),
    }


def _finish(done: ReshardedState, out: str, options: Conversion) -> None:
    made, receipt, sink = done.made, done.receipt, options.sink
    assert receipt is not None
    count = len(made.plan.shards)
    commands: list[Next] = [
        Command("inspect", (as_argument(out),)),
        done.next.replace(str(done.out), as_loaders_take_it(out)),
    ]
    sink.screen([shards_line(count, count, made.plan.total_bytes, receipt.seconds)])
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
