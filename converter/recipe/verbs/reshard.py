"""What `reshard` does: a model in other files or another dtype."""

from __future__ import annotations

from typing import Unpack

from converter.recipe.options import WriteOptions
from converter.recipe.recipe import SOURCE, Recipe, Step
from converter.recipe.verbs.conversion import Conversion, convert_recipe
from converter.recipe.verbs.knobs import Where, Writing, allowing, optional, options_of
from converter.recipe.verbs.pieces import cast_steps, output
from converter.sources.opening import input_spec


def reshard(
    src: Where, out: Where | None = None, *, dequantize: bool = False, **writing: Unpack[Writing]
) -> Conversion:
    """Rewrite a model in other files or another dtype; names, values and side files are kept.

    Args:
        src: a model.
        out: the folder to write, or `hf://owner/name`; None: only plan.
        dequantize: make quantised weights whole.
        writing: see `Writing`.

    Raises:
        Refused: broken content, or the output can't be written; nothing is on the disk.
        VerificationFailed: what was written is not what it should be; it is not published.
    """
    options, going = options_of(WriteOptions, writing)
    with allowing(options.allow_name):
        recipe = reshard_recipe(str(src), options, dequantize=dequantize)
        return convert_recipe(recipe, optional(out), options, going, lambda p: Conversion(prepared=p, options=options))


def reshard_recipe(src: str, options: WriteOptions, *, dequantize: bool = False) -> Recipe:
    """The recipe that the arguments mean."""
    steps = (*((Step("dequantize", {}),) if dequantize else ()), *cast_steps(options))
    return Recipe({SOURCE: input_spec(src, options.revision)}, steps, output(options), file="reshard")
