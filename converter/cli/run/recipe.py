"""`rlhf-convert run`."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from converter.cli.options import Conversion
from converter.cli.run.folder import convert
from converter.errors import UsageError
from converter.recipe.recipe import SOURCE, load_recipe
from converter.recipe.verbs.pieces import cast_steps, output
from converter.sources.opening import InputSpec, input_spec
from converter.text import show

if TYPE_CHECKING:
    from converter.recipe.run import Prepared


def run(name: str, given: tuple[str, ...], out: str | None, options: Conversion) -> int:
    """Run a recipe, with the inputs and the output options that the command line adds."""
    recipe = load_recipe(name).with_inputs(_inputs(given))
    steps = (*recipe.steps, *cast_steps(options.plain))
    recipe = dataclasses.replace(recipe, steps=steps, output=output(options.plain, recipe))
    if options.revision is not None:
        source = dataclasses.replace(recipe.inputs.get(SOURCE, InputSpec()), revision=options.revision)
        recipe = dataclasses.replace(recipe, inputs={**recipe.inputs, SOURCE: source})
    return convert(recipe, out, options, input_lines=input_lines)


def _inputs(given: tuple[str, ...]) -> dict[str, InputSpec]:
    """`NAME=PATH` as a mapping.

    Raises:
        UsageError: not of that form, or a name given twice (`usage`).
    """
    found: dict[str, InputSpec] = {}
    for each in given:
        name, equals, path = each.partition("=")
        if not equals or not name or not path:
            raise UsageError("usage", f"--input takes NAME=PATH, not {show(each)}")
        if name in found:
            raise UsageError("usage", f"--input {show(name)} is given twice")
        found[name] = input_spec(path)
    return found


def input_lines(prepared: Prepared) -> list[str]:
    """The screen's lines about the inputs, by their names in the recipe."""
    from converter.cli import lines as report

    lines = []
    for name, checkpoint in prepared.opened.items():
        if checkpoint.origin.kind == "adapter":
            lines.append(report.adapter_line(checkpoint))
        else:
            lines.append(report.base_line(name, checkpoint, recorded=name in prepared.recorded))
    return lines
