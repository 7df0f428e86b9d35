"""What `reshard` does: a model in other files or another dtype."""

from __future__ import annotations

from typing import Unpack

from converter.errors import UsageError
from converter.recipe.options import WriteOptions
from converter.recipe.recipe import SOURCE, Recipe, Step
from converter.recipe.verbs.allowing import allowing
from converter.recipe.verbs.conversion import Conversion, convert_recipe
from converter.recipe.verbs.knobs import Where, Writing, optional, options_of
from converter.recipe.verbs.pieces import cast_steps, output
from converter.sources.opening import input_spec
from converter.text import show

DCP = "dcp"


def reshard(
    src: Where,
    out: Where | None = None,
    *,
    dequantize: bool = False,
    to: str | None = None,
    under: str | None = None,
    **writing: Unpack[Writing],
) -> Conversion:
    """Rewrite a model in other files or another dtype; names, values and side files are kept.

    Args:
        src: a model.
        out: the folder to write, `hf://owner/name` or `s3://bucket/folder`; None: only plan.
        dequantize: make quantised weights whole.
        to: `dcp`: a torch distributed checkpoint, which trainers load on any number of ranks.
        under: keys of the dictionaries that it has the model in: `model` (default), `app.model`, ..., or `.` for none.
        writing: see `Writing`.

    Raises:
        UsageError: `to` is something else (`usage`).
        Refused: broken content, or the output can't be written; nothing is on the disk.
        VerificationFailed: what was written is not what it should be; it is not published.
    """
    options, going = options_of(WriteOptions, writing)
    with allowing(options.allow_name):
        recipe = reshard_recipe(str(src), options, dequantize=dequantize, to=to, under=under)
        return convert_recipe(recipe, optional(out), options, going, lambda p: Conversion(prepared=p, options=options))


def reshard_recipe(
    src: str, options: WriteOptions, *, dequantize: bool = False, to: str | None = None, under: str | None = None
) -> Recipe:
    """The recipe that the arguments mean.

    Raises:
        UsageError: an unknown kind of checkpoint, or `under` without one (`usage`).
    """
    if to not in (None, DCP):
        raise UsageError("usage", f"no kind of checkpoint is named {show(str(to))}", expected=DCP)
    if under is not None and to is None:
        raise UsageError("usage", "--under names dictionaries of a distributed checkpoint, and goes with --to dcp")
    steps = (*((Step("dequantize", {}),) if dequantize else ()), *cast_steps(options))
    if to is not None:
        steps = (*steps, Step("distribute", {} if under is None else {"under": under}))
    return Recipe({SOURCE: input_spec(src, options.revision)}, steps, output(options), file="reshard")
