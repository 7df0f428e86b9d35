"""`rlhf-convert average` and `interpolate`."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from converter.cli import lines as report
from converter.cli.options import Conversion as Flags
from converter.cli.run.folder import convert
from converter.recipe.recipe import Recipe
from converter.recipe.verbs import average as verb
from converter.recipe.verbs.average import average_recipe
from converter.recipe.verbs.conversion import Conversion


def average(models: Sequence[str], weights: Sequence[float], out: str | None, options: Flags) -> int:
    """Write the weighted mean of models."""
    own = functools.partial(verb.average, models, out, weights=weights)

    def recipe() -> Recipe:
        return average_recipe(models, weights, options.plain)

    convert(own, out, options, recipe=recipe, input_lines=input_lines)
    return 0


def input_lines(planned: Conversion) -> list[str]:
    """The screen's lines about the models."""
    return [report.base_line("model", c, recorded=False) for c in planned.prepared.opened.values()]
