"""`rlhf-convert reshard`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from converter.cli.options import Conversion
from converter.cli.run.folder import convert
from converter.recipe.recipe import SOURCE, Recipe, Step
from converter.recipe.verbs.pieces import cast_steps, output
from converter.sources.opening import input_spec

if TYPE_CHECKING:
    from converter.recipe.run import Prepared


def reshard(src: str, out: str | None, options: Conversion, *, dequantize: bool = False) -> int:
    """Rewrite a model folder."""
    steps = (*((Step("dequantize", {}),) if dequantize else ()), *cast_steps(options.plain))
    recipe = Recipe({SOURCE: input_spec(src, options.revision)}, steps, output(options.plain), file="reshard")
    return convert(recipe, out, options, input_lines=input_lines)


def input_lines(prepared: Prepared) -> list[str]:
    """The screen's line about the source."""
    from converter.cli import lines as report

    return [report.base_line("source", prepared.opened[SOURCE], recorded=False)]
