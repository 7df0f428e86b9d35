"""What `extract-lora`, `prune-lora` and `convert-lora` do: an adapter made of a tuned model, or of another adapter."""

from __future__ import annotations

from typing import Any, Unpack

from converter.errors import UsageError
from converter.recipe.options import WriteOptions
from converter.recipe.recipe import SOURCE, Recipe, Step
from converter.recipe.verbs.allowing import allowing
from converter.recipe.verbs.conversion import Conversion, convert_recipe
from converter.recipe.verbs.knobs import Where, Writing, optional, options_of
from converter.recipe.verbs.pieces import cast_steps, output
from converter.sources.opening import input_spec


def extract_lora(
    base: Where,
    tuned: Where,
    out: Where | None = None,
    *,
    rank: int | None = None,
    energy: float | None = None,
    **writing: Unpack[Writing],
) -> Conversion:
    """Write the LoRA adapter that a tuned model is of its base, by the singular vectors of what changed.

    Args:
        base: the model that training began with.
        tuned: the model that came out of it.
        out: the folder to write, `hf://owner/name` or `s3://bucket/folder`; None: only plan.
        rank: of every pair of factors.
        energy: in place of a rank, the share of each difference's squared norm that its pair keeps.
        writing: see `Writing`.

    Raises:
        UsageError: neither a rank nor an energy, or both (`usage`).
        Refused: the models are equal (`no-op`), differ in more than values (`models-differ`), or differ in what an
            adapter has no place for (`adapter-no-place`); or the output can't be written.
        VerificationFailed: what was written is not what it should be; it is not published.
    """
    options, going = options_of(WriteOptions, writing)
    with allowing(options.allow_name):
        recipe = extract_recipe(str(base), str(tuned), rank, energy, options)
        return convert_recipe(recipe, optional(out), options, going, lambda p: Conversion(prepared=p, options=options))


def extract_recipe(base: str, tuned: str, rank: int | None, energy: float | None, options: WriteOptions) -> Recipe:
    """The recipe that the arguments mean.

    Raises:
        UsageError: neither a rank nor an energy, or both (`usage`).
    """
    if (rank is None) == (energy is None):
        raise UsageError("usage", "give one of --rank and --energy", expected="--rank 32, or --energy 0.99")
    how = {"rank": rank} if energy is None else {"energy": energy}
    fields: dict[str, Any] = {"base": "base", **how}
    inputs = {SOURCE: input_spec(tuned, options.revision), "base": input_spec(base)}
    return Recipe(inputs, (Step("extract-lora", fields), *cast_steps(options)), output(options), file="extract-lora")


def prune_lora(adapter: Where, out: Where | None = None, *, rank: int, **writing: Unpack[Writing]) -> Conversion:
    """Write a LoRA adapter at a lower rank, each pair the best of that rank, every scale what it was.

    Args:
        adapter: a folder or a name on the Hub.
        out: the folder to write, `hf://owner/name` or `s3://bucket/folder`; None: only plan.
        rank: of every pair that has a larger one.
        writing: see `Writing`.

    Raises:
        UsageError: the rank is not 1 or more (`usage`).
        Refused: it is not plain LoRA (`not-plain-lora`), or no pair has a larger rank (`no-op`).
        VerificationFailed: what was written is not what it should be; it is not published.
    """
    options, going = options_of(WriteOptions, writing)
    with allowing(options.allow_name):
        recipe = adapter_recipe(str(adapter), "prune-lora", {"rank": rank}, options)
        return convert_recipe(recipe, optional(out), options, going, lambda p: Conversion(prepared=p, options=options))


def convert_lora(
    adapter: Where, out: Where | None = None, *, for_: str, base: Where | None = None, **writing: Unpack[Writing]
) -> Conversion:
    """Write a LoRA adapter in the form that another program reads, every update what it was.

    Args:
        adapter: a folder or a name on the Hub: PEFT's, mlx-lm's or Tinker's.
        out: the folder to write, `hf://owner/name` or `s3://bucket/folder`; None: only plan.
        for_: `peft`, `peft@0.13`, `transformers@4`, `vllm`, `mlx` or `tinker`.
        base: the model that it is over; needed for factors of experts.
        writing: see `Writing`.

    Raises:
        UsageError: no such target (`usage`), or experts and no base (`base-needed`).
        Refused: it is not plain LoRA (`not-plain-lora`), or the target has no place for what it holds
            (`adapter-not-for-target`).
        VerificationFailed: what was written is not what it should be; it is not published.
    """
    options, going = options_of(WriteOptions, writing)
    with allowing(options.allow_name):
        recipe = adapter_recipe(str(adapter), "convert-lora", {"target": for_}, options, optional(base))
        return convert_recipe(recipe, optional(out), options, going, lambda p: Conversion(prepared=p, options=options))


def adapter_recipe(
    adapter: str, verb: str, fields: dict[str, Any], options: WriteOptions, base: str | None = None
) -> Recipe:
    """The recipe of a step over an adapter."""
    inputs = {SOURCE: input_spec(adapter, options.revision)}
    if base is not None:
        inputs["base"] = input_spec(base)
        fields = {**fields, "base": "base"}
    return Recipe(inputs, (Step(verb, fields), *cast_steps(options)), output(options), file=verb)
