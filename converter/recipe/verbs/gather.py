"""What `gather` does: which tag, which part, which base, as a recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from converter.core.tensors.dtypes import DType
from converter.diagnostic import Command
from converter.errors import UsageError
from converter.recipe.options import WriteOptions
from converter.recipe.recipe import SOURCE, Recipe, Step
from converter.recipe.verbs.pieces import cast_steps, output
from converter.recipe.verbs.run_state import place_of
from converter.sources.opening import InputSpec, input_spec
from converter.text import show


@dataclass(frozen=True)
class GatherRequest:
    """What the user asked for.

    Attributes:
        recorded: the base is the one that the run's adapter config records.
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
