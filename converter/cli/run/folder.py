"""From a recipe to a written checkpoint, with the screen around it. Every verb that writes goes through here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from converter.cli.options import Conversion
from converter.cli.run.hub import check_push, convert_to_hub, push_written, with_command
from converter.cli.run.planned import (
    Written,
    load_commands,
    missing_output,
    notes_json,
    plan_recipe,
    write_prepared,
)
from converter.cli.sink import Sink
from converter.diagnostic import Next
from converter.errors import Refused
from converter.publish.outputs import goes_to_hub

if TYPE_CHECKING:
    from converter.recipe.recipe import Recipe
    from converter.recipe.run import Prepared


def convert(
    recipe: Recipe,
    out: str | None,
    options: Conversion,
    *,
    input_lines: Callable[[Prepared], list[str]],
    next_commands: Callable[[Written], Sequence[Next]] | None = None,
) -> int:
    """Run a recipe as the options say and return the exit code; `input_lines` tells the screen of the inputs."""
    sink = options.sink
    if options.print_recipe:
        if sink.as_json:
            sink.json({"recipe": recipe.to_yaml()})
        else:
            sink.data(recipe.to_yaml().rstrip("\n"))
        return 0
    if out is None and not options.dry_run:
        raise missing_output()
    if out is not None and goes_to_hub(out) and not options.dry_run:
        return convert_to_hub(
            recipe, out, options, input_lines=input_lines, next_commands=next_commands or load_commands
        )
    check_push(options)
    written = write_recipe(recipe, out, options, input_lines=input_lines)
    if written is not None:
        commands = next_commands or load_commands
        _finish(written, sink, commands(written))
        push_written(written.out, options)
    return 0


def write_recipe(
    recipe: Recipe, out: str | None, options: Conversion, *, input_lines: Callable[[Prepared], list[str]]
) -> Written | None:
    """Plan, show the plan and write; None after a dry run."""
    target = None if out is None or goes_to_hub(out) else Path(out).expanduser()
    planned = plan_recipe(recipe, target, options, input_lines=input_lines)
    try:
        if options.dry_run:
            _dry_run(planned.prepared, target, planned.memory, options)
            return None
        assert target is not None
        assert out is not None
        receipt = write_prepared(planned.prepared, target, planned.jobs, planned.memory, options)
    except Refused as error:
        raise with_command(error, out or "") from error.__cause__
    return Written(planned.prepared, receipt, out)


def _dry_run(prepared: Prepared, target: Path | None, memory: int | None, options: Conversion) -> None:
    """The refusals that a real run would make before its first byte, then the plan as data."""
    from converter.cli import lines as report
    from converter.core.writer import preflight

    plan = prepared.plan
    preflight.memory_limit(plan, memory)
    if target is not None:
        preflight.check_target(target, plan.inputs, overwrite=options.overwrite)
        preflight.check_space(plan, target)
    options.sink.screen(["dry run: nothing written"])
    options.sink.json(
        {
            "dry_run": True,
            "counts": plan.counts,
            "total_bytes": plan.total_bytes,
            "fingerprint": plan.fingerprint,
            "files": report.files_json(plan),
            "dropped": dict(plan.dropped),
            "notes": notes_json(prepared),
            "repaired": dict(prepared.checkpoint.repaired),
        }
    )


def _finish(written: Written, sink: Sink, commands: Sequence[Next]) -> None:
    """The screen's last lines, and what to type next."""
    from converter.cli import lines as report

    receipt = written.receipt
    sink.screen(written.screen(verbose=sink.verbose))
    sink.screen(report.next_lines(commands))
    sink.json(
        {
            "out": written.out,
            "receipt": dict(receipt.content),
            "notes": notes_json(written.prepared),
            "seconds": round(receipt.seconds, 3),
            "next": list(map(str, commands)),
        }
    )
