"""`rlhf-convert reshard`."""

from __future__ import annotations

import functools

from converter.cli import lines as report
from converter.cli.options import Conversion as Flags
from converter.cli.run.folder import convert
from converter.recipe.recipe import SOURCE, Recipe
from converter.recipe.verbs import reshard as verb
from converter.recipe.verbs.conversion import Conversion
from converter.recipe.verbs.reshard import reshard_recipe


def reshard(src: str, out: str | None, options: Flags, *, dequantize: bool = False) -> int:
    """Rewrite a model folder."""
    own = functools.partial(verb.reshard, src, out, dequantize=dequantize)

    def recipe() -> Recipe:
        return reshard_recipe(src, options.plain, dequantize=dequantize)

    convert(own, out, options, recipe=recipe, input_lines=input_lines)
    return 0


def input_lines(planned: Conversion) -> list[str]:
    """The screen's line about the source."""
    return [report.base_line("source", planned.prepared.opened[SOURCE], recorded=False)]
