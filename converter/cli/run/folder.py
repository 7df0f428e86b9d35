"""From arguments to a written checkpoint, with the screen around it. Every verb that writes goes through here."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from converter.cli.options import Conversion as Flags
from converter.cli.progress import progress
from converter.cli.report.asked import expect_report
from converter.cli.report.writing import write_report
from converter.cli.run.hub import check_push, finish_in_store, finish_on_hub, hub_lines, push_written, with_command
from converter.cli.run.planned import (
    dry_run,
    finish,
    finish_both,
    finish_task,
    load_commands,
    missing_output,
    plan_lines,
    plans_of_two,
)
from converter.diagnostic import Next
from converter.errors import Interrupted, Refused, UsageError
from converter.publish.outputs import goes_to_hub, is_remote
from converter.recipe.progress import Bar, Lines
from converter.recipe.verbs.conversion import SUFFIX, Conversion

if TYPE_CHECKING:
    from converter.recipe.recipe import Recipe

V = TypeVar("V")


def convert(
    verb: Callable[..., V],
    out: str | None,
    options: Flags,
    *,
    recipe: Callable[[], Recipe],
    input_lines: Callable[[Any], list[str]],
    next_commands: Callable[[Any], Sequence[Next]] = load_commands,
) -> V | None:
    """Run a function of `converter` as the flags say, with its plan and its result on the screen.

    Args:
        verb: takes the shared keyword arguments, its own are given already.
        recipe: for `--print-recipe`, after which there is no result.
        input_lines: what the screen says of the inputs, of the planned result.
        next_commands: what to type next, of the finished one.
    """
    expect_report(options.report, out)
    if options.print_recipe:
        print_recipe(recipe(), options)
        return None
    if out is None and not options.dry_run:
        raise missing_output()
    if goes_to_hub(out) and not options.dry_run and options.push_to_hub is not None:
        raise UsageError("usage", f"{out} is on the Hub already; leave --push-to-hub out")
    if is_remote(out) and not options.dry_run and options.push_to_hub is not None:
        raise UsageError("usage", f"{out} is no folder of this machine; leave --push-to-hub out, or write to hf://")
    check_push(options)
    done = written(verb, out, options, input_lines=input_lines)
    if isinstance(done, Conversion):
        _finish(done, options, next_commands)
        _report(done, options, next_commands)
    return done


def _report(done: Conversion, options: Flags, next_commands: Callable[[Any], Sequence[Next]]) -> None:
    """The page of a run that was planned or written here."""
    if options.report is None or (done.receipt is None and done.task is not None):
        return
    from converter.cli.report.of_run import grid_of_run, page_of

    following = next_commands(done) if done.receipt is not None else ()
    write_report(options.report, options.sink, lambda: page_of(done, following), lambda: grid_of_run(done))


def written(verb: Callable[..., V], out: str | None, options: Flags, *, input_lines: Callable[[Any], list[str]]) -> V:
    """Plan, show the plan and write."""
    with running(out, options) as reporter:

        def show_plan(planned: Conversion) -> None:
            reporter.hide()
            options.sink.screen(input_lines(planned))
            lines = plan_lines if planned.adapter is None else plans_of_two
            options.sink.screen(lines(planned, verbose=options.verbose))
            options.sink.screen(hub_lines(planned))

        return verb(**options.knobs(reporter, show_plan))


def print_recipe(recipe: Recipe, options: Flags) -> None:
    """The recipe as data."""
    if options.as_json:
        options.sink.json({"recipe": recipe.to_yaml()})
    else:
        options.sink.data(recipe.to_yaml().rstrip("\n"))


@contextmanager
def running(out: str | None, options: Flags) -> Iterator[Bar | Lines]:
    """What hears how a run goes on; errors of the run get what the command line knows.

    Raises:
        Interrupted: a signal came; nothing is published.
    """
    try:
        with progress(options.sink) as reporter:
            yield reporter
    except Refused as error:
        raise with_command(error) from error.__cause__
    except KeyboardInterrupt as stop:
        if out is None or is_remote(out) or options.dry_run:
            raise
        number = stop.args[0] if stop.args else signal.SIGINT
        raise Interrupted(number, f"interrupted, nothing published: {_kept(out)}") from None


def _kept(out: str) -> str:
    folder = Path(out).expanduser()
    partials = (folder.with_name(f"{folder.name}{suffix}.partial") for suffix in ("", SUFFIX))
    partial = next((p for p in partials if p.exists()), None)
    if partial is None:
        return "the same command begins anew"
    return f"what is done is kept in {partial}; the same command again resumes it"


def _finish(done: Conversion, options: Flags, next_commands: Callable[[Any], Sequence[Next]]) -> None:
    """The screen's last lines, and what to type next."""
    if done.receipt is None and done.task is not None:
        finish_task(done, options.sink)
    elif done.receipt is None and not done.earlier:
        dry_run(done, options.sink)
    elif done.published is not None:
        finish_on_hub(done, options.sink, next_commands(done))
    elif done.stored is not None:
        finish_in_store(done, options.sink)
    elif done.adapter is not None:
        finish_both(done, options.sink, next_commands)
    else:
        finish(done, options.sink, next_commands(done))
        push_written(str(done.out), options)
