"""What `make-delta` and `apply-delta` do: the difference of two models, and models with differences added."""

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


def make_delta(base: Where, tuned: Where, out: Where | None = None, **writing: Unpack[Writing]) -> Conversion:
    """Write what training added to a base: `TUNED - BASE` in fp32, tensor by tensor.

    Args:
        base: the model that training began with.
        tuned: the model that came out of it.
        out: the folder to write, `hf://owner/name` or `s3://bucket/folder`; None: only plan.
        writing: see `Writing`.

    Raises:
        Refused: the models differ in more than values (`models-differ`), or the output can't be written.
        VerificationFailed: what was written is not what it should be; it is not published.
    """
    options, going = options_of(WriteOptions, writing)
    with allowing(options.allow_name):
        recipe = make_recipe(str(base), str(tuned), options)
        return convert_recipe(recipe, optional(out), options, going, lambda p: Conversion(prepared=p, options=options))


def apply_delta(
    base: Where,
    deltas: Where | Sequence[Where],
    out: Where | None = None,
    *,
    weights: Sequence[float] = (),
    **writing: Unpack[Writing],
) -> Conversion:
    """Write a model plus differences, each times a weight: summed in fp64 and rounded once to the model's dtypes.

    Args:
        base: the model that they are added to.
        deltas: folders that `make_delta` wrote, one or more.
        out: the folder to write, `hf://owner/name` or `s3://bucket/folder`; None: only plan.
        weights: one number for each; empty: 1 for all.
        writing: see `Writing`.

    Raises:
        UsageError: no difference, or not one weight for each (`usage`).
        Refused: a difference is of another model in more than values (`models-differ`), or is none (`not-a-delta`).
        VerificationFailed: what was written is not what it should be; it is not published.
    """
    several = [deltas] if isinstance(deltas, str) or not isinstance(deltas, Sequence) else deltas
    options, going = options_of(WriteOptions, writing)
    with allowing(options.allow_name):
        recipe = apply_recipe(str(base), [str(d) for d in several], weights, options)
        return convert_recipe(recipe, optional(out), options, going, lambda p: Conversion(prepared=p, options=options))


def make_recipe(base: str, tuned: str, options: WriteOptions) -> Recipe:
    """The recipe of a difference."""
    inputs = {SOURCE: input_spec(tuned, options.revision), "base": input_spec(base)}
    steps = (Step("make-delta", {"base": "base"}), *cast_steps(options))
    return Recipe(inputs, steps, output(options), file="make-delta")


def apply_recipe(base: str, deltas: Sequence[str], weights: Sequence[float], options: WriteOptions) -> Recipe:
    """The recipe of a sum.

    Raises:
        UsageError: no difference (`usage`).
    """
    if not deltas:
        raise UsageError("usage", "apply-delta needs a model and a difference", expected="BASE DELTA ... OUT")
    others = {f"delta-{n}": input_spec(path) for n, path in enumerate(deltas, 1)}
    fields: dict[str, Any] = {"deltas": list(others)}
    if weights:
        fields["weights"] = [float(w) for w in weights]
    inputs = {SOURCE: input_spec(base, options.revision), **others}
    return Recipe(inputs, (Step("apply-delta", fields), *cast_steps(options)), output(options), file="apply-delta")
