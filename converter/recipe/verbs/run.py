"""What `run` does: any recipe, planned (`plan`), written (`run`), or first the one and then the other (`write`)."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Unpack, overload

from converter.errors import UsageError
from converter.publish.outputs import is_remote
from converter.recipe.options import WriteOptions
from converter.recipe.recipe import SOURCE, Recipe, load_recipe
from converter.recipe.verbs.allowing import allowing
from converter.recipe.verbs.conversion import C, Conversion, convert_recipe, write_plan, write_planned
from converter.recipe.verbs.knobs import Effort, Where, Writing, optional, options_of
from converter.recipe.verbs.pieces import cast_steps, output
from converter.recipe.verbs.task import task_of
from converter.sources.opening import InputSpec, input_spec

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from converter.core.writer.plan import Plan
    from converter.core.writer.reporter import Reporter
    from converter.core.writer.write import Receipt
    from converter.recipe.run import Prepared


def plan(
    recipe: str | Path | Recipe,
    out: Where | None = None,
    *,
    inputs: Mapping[str, Where] | None = None,
    **writing: Unpack[Writing],
) -> Conversion:
    """Everything that a recipe would write, from headers alone; nothing is written.

    Args:
        recipe: a YAML file, the name of a shipped recipe, or one that another result has (`found.recipe`).
        out: where it would go, whose place and space are then checked; `write` needs none.
        inputs: places of the recipe's inputs, by their names.
        writing: see `Writing`.

    Raises:
        UsageError: no such recipe, not a valid one, or an input without a place.
        Refused: what a run would refuse before its first byte.
    """
    writing["dry_run"] = True
    return run(recipe, out, inputs=inputs, **writing)


def run(
    recipe: str | Path | Recipe,
    out: Where | None = None,
    *,
    inputs: Mapping[str, Where] | None = None,
    task: str | None = None,
    **writing: Unpack[Writing],
) -> Conversion:
    """Run a recipe: any chain of steps, in one pass. Arguments as of `plan`.

    Args:
        task: write one share of the files, `2/8`, as one of several processes with the same recipe and output; `auto`
            takes it from the scheduler's environment. The last one ends the run, and has the receipt.

    Raises:
        UsageError: no such recipe, not a valid one, an input without a place, or no such task.
        Refused: a step refuses, or the output can't be written; nothing is on the disk.
        VerificationFailed: what was written is not what it should be; it is not published.
    """
    options, going = options_of(WriteOptions, writing)
    with allowing(options.allow_name):
        share = None if task is None else task_of(task, os.environ)
        target = optional(out)
        if share is not None and (target is None or is_remote(target)):
            raise UsageError("usage", "--task needs an output folder, which all tasks share")
        meant = run_recipe(recipe, inputs or {}, options)

        def made(prepared: Prepared) -> Conversion:
            return Conversion(prepared=prepared, options=options)

        return convert_recipe(meant, target, options, going, made, share)


def run_recipe(recipe: str | Path | Recipe, inputs: Mapping[str, Where], options: WriteOptions) -> Recipe:
    """The recipe with the inputs and the output options that the arguments add."""
    loaded = recipe if isinstance(recipe, Recipe) else load_recipe(str(recipe))
    loaded = loaded.with_inputs({name: input_spec(str(place)) for name, place in inputs.items()})
    steps = (*loaded.steps, *cast_steps(options))
    loaded = dataclasses.replace(loaded, steps=steps, output=output(options, loaded))
    if options.revision is None:
        return loaded
    source = dataclasses.replace(loaded.inputs.get(SOURCE, InputSpec()), revision=options.revision)
    return dataclasses.replace(loaded, inputs={**loaded.inputs, SOURCE: source})


@overload
def write(
    planned: C, out: Where | None = None, *, reporter: Reporter | None = None, executor: Executor | None = None
) -> C: ...


@overload
def write(planned: Plan, out: Where, **how: Unpack[Effort]) -> Receipt: ...


def write(planned: C | Plan, out: Where | None = None, **how: Unpack[Effort]) -> C | Receipt:
    """Write what was planned, as the options that it was planned with say.

    Args:
        planned: the result of `plan`, or of a verb without `out` or with `dry_run=True`; or a plan of `make_plan`.
        out: a folder; None: the one that it was planned for.
        how: `reporter` and `executor`; of a plan of `make_plan`, which has no options, those of `Effort` too.

    Raises:
        UsageError: there is no folder to write to, or it is on the Hub (`usage`): name it where you plan.
        Refused: the target, the disk, the memory or a changed input does not allow it; nothing is published.
        VerificationFailed: what was written is not what it should be; it is not published.
    """
    if isinstance(planned, Conversion):
        return write_planned(planned, optional(out), how.get("reporter"), how.get("executor"))
    return write_plan(planned, optional(out), *options_of(WriteOptions, how))
