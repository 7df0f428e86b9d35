"""What `gather` does: which tag, which part, which base, as a recipe."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any, Unpack

from converter.core.tensors.dtypes import DType
from converter.diagnostic import Again, Command, Steps
from converter.errors import ConvertError, UsageError
from converter.recipe.options import Going, WriteOptions
from converter.recipe.recipe import SOURCE, Recipe, Step
from converter.recipe.verbs.allowing import allowing
from converter.recipe.verbs.conversion import Conversion, convert_recipe, prepared_of
from converter.recipe.verbs.knobs import Where, Writing, optional, options_of
from converter.recipe.verbs.pieces import cast_steps, output
from converter.recipe.verbs.run_state import place_of, with_recorded_base
from converter.recipe.verbs.two_outputs import convert_both
from converter.sources.opening import InputSpec, input_spec
from converter.text import show


@dataclass(frozen=True)
class GatherRequest:
    """What the user asked for.

    Attributes:
        recorded: the base is the one that the run's adapter config records.
        dequantize: a quantised base is made whole before the merge.
    """

    src: str
    tag: str | None = None
    base: str | None = None
    master: bool = False
    emit: str | None = None
    lora_alpha: float | None = None
    part: str | None = None
    rslora: bool = False
    recorded: bool = False
    dequantize: bool = False


@dataclass(frozen=True, kw_only=True)
class Gathered(Conversion):
    """A gathered run.

    Attributes:
        said: which tag was taken, and why, in words; empty where only one is there.
        base: the base that was named.
    """

    said: str = ""
    base: str | None = None


def gather(
    src: Where,
    out: Where | None = None,
    *,
    tag: str | None = None,
    base: Where | None = None,
    master: bool = False,
    emit: str | None = None,
    part: str | None = None,
    lora_alpha: float | None = None,
    rslora: bool = False,
    dequantize: bool = False,
    **writing: Unpack[Writing],
) -> Gathered:
    """Make a model, or the LoRA adapter that was trained, of a trainer's shards: DeepSpeed, FSDP, DCP, verl.

    Args:
        src: the folder of shards, its parent, or the run's.
        out: the folder to write, `hf://owner/name` or `s3://bucket/folder`; None: only plan.
        tag: which checkpoint; None: what `latest` says.
        base: for config, tokenizer and weights that aren't saved; None: the one that the run records, if needed.
        master: keep the fp32 masters, as `dtype="float32"`.
        emit: after LoRA `adapter`, `merged`, or `both`: the model in `out`, and the adapter in `out`-adapter, whose
            result is `found.adapter`; `state`: the tensors under the run's own names, which are no model. None: the
            adapter where one was trained.
        part: which model, where the state holds several.
        lora_alpha: lora_alpha of training, where no config records it; `rslora` likewise.
        dequantize: make the quantised base of a QLoRA run whole first; with `emit="merged"` or `"both"`.
        writing: see `Writing`.

    Raises:
        UsageError: several tags or models to choose from, or `dequantize` without a merge.
        Refused: shards are missing, or the output can't be written; nothing is on the disk.
        VerificationFailed: what was written is not what it should be; it is not published.
    """
    options, going = options_of(WriteOptions, writing)
    request = GatherRequest(
        str(src), tag=tag, base=optional(base), master=master, emit=emit, lora_alpha=lora_alpha, part=part,
        rslora=rslora, dequantize=dequantize,
    )  # fmt: skip
    with allowing(options.allow_name):
        return gathered(request, optional(out), options, going)


def gathered(request: GatherRequest, out: str | None, options: WriteOptions, going: Going) -> Gathered:
    """What `gather` does, of plain values.

    Raises:
        UsageError: a base is to be made whole, and none is written (`usage`).
    """
    if request.dequantize and request.emit not in ("merged", "both"):
        what = "--dequantize makes the base of a QLoRA run whole for a merge, and an adapter has no base in it"
        raise UsageError("usage", what, expected="--emit merged or --emit both", next=Again(("--emit", "merged")))
    options = dataclasses.replace(options, dtype=with_masters(request, options.dtype))

    def recipe_of(recorded: bool, emit: str | None) -> tuple[Recipe, str]:
        return gather_recipe(dataclasses.replace(request, recorded=recorded, emit=emit), options)

    def planned(recorded: bool, emit: str) -> Gathered:
        recipe, said = recipe_of(recorded, emit)
        return Gathered(prepared=prepared_of(recipe, options), options=options, said=said, base=request.base)

    def attempt(recorded: bool) -> Gathered:
        if request.emit == "both":
            return convert_both(functools.partial(planned, recorded), out, options, going)
        recipe, said = recipe_of(recorded, request.emit)
        return convert_recipe(
            recipe, out, options, going,
            lambda p: Gathered(prepared=p, options=options, said=said, base=request.base),
        )  # fmt: skip

    try:
        return with_recorded_base(attempt, given=request.base is not None)
    except ConvertError as error:
        if error.code == "lora-alpha-unknown":
            error.next = Steps(error.next, ", and --rslora if it set use_rslora")
        raise


def gather_command(asked: GatherRequest, out: str | None) -> Command:
    """The command that means this, without what makes no difference to the input."""
    given = {"--tag": asked.tag, "--part": asked.part, "--emit": asked.emit, "--base": asked.base}
    options = (w for name, value in given.items() if value is not None for w in (name, value))
    return Command("gather", (asked.src, out or "OUT", *options))


def with_masters(asked: GatherRequest, dtype: str | None) -> str | None:
    """`--master` and `--dtype float32` are one wish.

    Raises:
        UsageError: `--master` with another dtype (`usage`).
    """
    if not asked.master:
        return dtype
    if dtype is not None and DType.parse(dtype) is not DType.F32:
        raise UsageError("usage", f"--master keeps fp32, and --dtype says {dtype}; give one")
    return "float32"


def gather_recipe(asked: GatherRequest, options: WriteOptions) -> tuple[Recipe, str]:
    """The recipe that the arguments mean, and how the tag was chosen, in words.

    Raises:
        UsageError: several tags or checkpoints to choose from.
    """
    path, said, part = _tag_path(asked, options)
    master = options.dtype is not None and DType.parse(options.dtype) is DType.F32
    inputs = {SOURCE: InputSpec(path, revision=options.revision, master=master)}
    fields: dict[str, Any] = {}
    if asked.emit is not None:
        fields["emit"] = asked.emit
    if asked.base is not None:
        inputs["base"] = input_spec(asked.base)
        fields["base"] = "base"
    elif asked.recorded:
        inputs["base"] = InputSpec(base_of=SOURCE)
        fields["base"] = "base"
    if part is not None:
        fields["part"] = part
    if asked.lora_alpha is not None:
        fields["lora-alpha"] = asked.lora_alpha
    if asked.rslora:
        fields["rslora"] = True
    if asked.dequantize and asked.emit != "adapter":
        fields["dequantize"] = True
    steps = (Step("gather", fields), *cast_steps(options))
    return Recipe(inputs, steps, output(options), file="gather"), said


def _tag_path(asked: GatherRequest, options: WriteOptions) -> tuple[str, str, str | None]:
    """The folder with the shards, as the user would write it, why it is the one, and the part inside of it."""
    from converter.sources.hub.names import as_reference, below
    from converter.sources.locate import resolve

    root = resolve(asked.src, revision=options.revision, token=options.token, in_parts=True, whole=True).path
    tag, part = place_of(root, as_reference(asked.src), tag=asked.tag, part=asked.part)
    if tag.folder == root:
        return asked.src, "", part
    return below(asked.src, root, tag.folder), f"tag {show(tag.folder.name)}: {tag.why}", part
