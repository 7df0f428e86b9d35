"""`rlhf-convert run`."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from converter.cli import lines as report
from converter.cli.options import Conversion as Flags
from converter.cli.run.folder import convert
from converter.errors import UsageError
from converter.recipe.verbs import run as verb
from converter.recipe.verbs.conversion import Conversion
from converter.recipe.verbs.run import run_recipe
from converter.text import show

if TYPE_CHECKING:
    from concurrent.futures import Executor


@dataclass(frozen=True)
class Spread:
    """Which processes write: this one alone, as one of several (`task`), or with the workers of a Ray cluster."""

    task: str | None = None
    on_ray: bool = False
    ray_address: str | None = None
    ray_resource: str | None = None


def run(name: str, given: tuple[str, ...], out: str | None, options: Flags, spread: Spread) -> int:
    """Run a recipe, with the inputs and the output options that the command line adds."""
    inputs = _inputs(given)
    _expect_one_way(spread)
    with _executor(spread, is_needed=not (options.dry_run or options.print_recipe)) as executor:
        own = functools.partial(verb.run, name, out, inputs=inputs, task=spread.task, executor=executor)
        convert(own, out, options, recipe=lambda: run_recipe(name, inputs, options.plain), input_lines=input_lines)
    return 0


def _expect_one_way(spread: Spread) -> None:
    """Refuse options that contradict each other, or of which one is missing.

    Raises:
        UsageError: says which (`usage`).
    """
    if spread.on_ray and spread.task is not None:
        raise UsageError("usage", "--task is one of several processes, --executor ray is all of them; give one")
    if not spread.on_ray and (spread.ray_address or spread.ray_resource):
        raise UsageError("usage", "--ray-address and --ray-resource go with --executor ray")


@contextlib.contextmanager
def _executor(spread: Spread, *, is_needed: bool) -> Iterator[Executor | None]:
    """The cluster that the options name, joined until the block ends."""
    if not spread.on_ray or not is_needed:
        yield None
        return
    from converter.core.writer.on_ray import RayExecutor

    with RayExecutor(spread.ray_address, near=spread.ray_resource) as executor:
        yield executor


def _inputs(given: tuple[str, ...]) -> dict[str, str]:
    """`NAME=PATH` as a mapping.

    Raises:
        UsageError: not of that form, or a name given twice (`usage`).
    """
    found: dict[str, str] = {}
    for each in given:
        name, equals, path = each.partition("=")
        if not equals or not name or not path:
            raise UsageError("usage", f"--input takes NAME=PATH, not {show(each)}")
        if name in found:
            raise UsageError("usage", f"--input {show(name)} is given twice")
        found[name] = path
    return found


def input_lines(planned: Conversion) -> list[str]:
    """The screen's lines about the inputs, by their names in the recipe."""
    lines = []
    for name, checkpoint in planned.prepared.opened.items():
        if checkpoint.origin.kind == "adapter":
            lines.append(report.adapter_line(checkpoint))
        else:
            lines.append(report.base_line(name, checkpoint, recorded=name in planned.prepared.recorded))
    return lines
