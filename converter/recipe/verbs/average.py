"""What `average` and `interpolate` do: the weighted mean of models of one architecture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Unpack

from converter.errors import UsageError
from converter.recipe.options import WriteOptions
from converter.recipe.recipe import SOURCE, Recipe, Step
from converter.recipe.verbs.allowing import allowing
from converter.recipe.verbs.conversion import Conversion, convert_recipe
from converter.recipe.verbs.knobs import Where, Writing, optional, options_of
from converter.recipe.verbs.pieces import cast_steps, output
from converter.sources.opening import input_spec


def average(
    models: Sequence[Where], out: Where | None = None, *, weights: Sequence[float] = (), **writing: Unpack[Writing]
) -> Conversion:
    """Write the weighted mean of models, summed in fp64 and rounded once, with the first one's side files.

    Args:
        models: two or more that differ in values only.
        out: the folder to write, `hf://owner/name` or `s3://bucket/folder`; None: only plan.
        weights: one number for each model, divided by their sum; empty: the plain mean.
        writing: see `Writing`.

    Raises:
        UsageError: fewer than two models, or not one weight for each (`usage`).
        Refused: the models differ in more than values (`models-differ`), or the output can't be written.
        VerificationFailed: what was written is not what it should be; it is not published.
    """
    options, going = options_of(WriteOptions, writing)
    with allowing(options.allow_name):
        recipe = average_recipe([str(m) for m in models], weights, options)
        return convert_recipe(recipe, optional(out), options, going, lambda p: Conversion(prepared=p, options=options))


def interpolate(
    a: Where, b: Where, out: Where | None = None, *, t: float = 0.5, **writing: Unpack[Writing]
) -> Conversion:
    """Write `(1 - t) * A + t * B`, summed in fp64 and rounded once.

    Args:
        a: the model at 0, whose side files are kept.
        b: the model at 1.
        out: the folder to write, `hf://owner/name` or `s3://bucket/folder`; None: only plan.
        t: where between them; below 0 or above 1 it goes on along the line.
        writing: see `Writing`.

    Raises:
        Refused: see `average`.
    """
    return average((a, b), out, weights=(1.0 - t, t), **writing)


def average_recipe(models: Sequence[str], weights: Sequence[float], options: WriteOptions) -> Recipe:
    """The recipe that the arguments mean.

    Raises:
        UsageError: fewer than two models (`usage`).
    """
    if len(models) < 2:
        raise UsageError("usage", "average needs two models or more", expected="A B ... OUT")
    others = {f"model-{n}": input_spec(path) for n, path in enumerate(models[1:], 2)}
    fields: dict[str, Any] = {"others": list(others)}
    if weights:
        fields["weights"] = [float(w) for w in weights]
    inputs = {SOURCE: input_spec(models[0], options.revision), **others}
    return Recipe(inputs, (Step("average", fields), *cast_steps(options)), output(options), file="average")
