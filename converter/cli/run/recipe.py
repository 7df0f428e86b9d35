"""`rlhf-convert run`."""

from __future__ import annotations

import functools

from converter.cli import lines as report
from converter.cli.options import Conversion as Flags
from converter.cli.run.folder import convert
from converter.errors import UsageError
from converter.recipe.verbs import run as verb
from converter.recipe.verbs.conversion import Conversion
from converter.recipe.verbs.run import run_recipe
from converter.text import show


def run(name: str, given: tuple[str, ...], out: str | None, options: Flags, task: str | None) -> int:
    """Run a recipe, with the inputs and the output options that the command line adds."""
    inputs = _inputs(given)
    own = functools.partial(verb.run, name, out, inputs=inputs, task=task)
    convert(own, out, options, recipe=lambda: run_recipe(name, inputs, options.plain), input_lines=input_lines)
    return 0


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
