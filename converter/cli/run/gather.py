"""`rlhf-convert gather`."""

from __future__ import annotations

import dataclasses
import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from converter.cli.options import Conversion
from converter.cli.run.folder import convert
from converter.core.tensors.dtypes import DType
from converter.errors import ConvertError, UsageError
from converter.recipe.recipe import SOURCE, Recipe, Step
from converter.recipe.verbs.pieces import cast_steps, output
from converter.recipe.verbs.run_state import corrected, place_of, with_recorded_base
from converter.sources.opening import InputSpec, input_spec
from converter.text import show

if TYPE_CHECKING:
    from converter.cli.run.folder import Written
    from converter.recipe.run import Prepared


@dataclass(frozen=True)
class Gathering:
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


def gather(asked: Gathering, out: str | None, options: Conversion) -> int:
    """Gather a trainer's shards into a model or an adapter."""
    options = _with_masters(asked, options)

    def attempt(recorded: bool) -> int:
        return _gather(dataclasses.replace(asked, recorded=recorded), out, options)

    try:
        return with_recorded_base(attempt, given=asked.base is not None)
    except ConvertError as error:
        corrected(error, _command(asked, out))
        raise


def _gather(asked: Gathering, out: str | None, options: Conversion) -> int:
    if asked.emit == "both":
        from converter.cli.run.two_outputs import gather_both

        return gather_both(asked, out, options)
    recipe, said = gather_recipe(asked, options)
    return convert(
        recipe,
        out,
        options,
        head=lambda prepared: head(prepared, said),
        next_commands=lambda w: next_commands(w, asked),
    )


def _command(asked: Gathering, out: str | None) -> list[str]:
    """The command that was given, without what makes no difference to the input."""
    words = ["rlhf-convert", "gather", asked.src, out or "OUT"]
    given = {"--tag": asked.tag, "--part": asked.part, "--emit": asked.emit, "--base": asked.base}
    return [*words, *(w for name, value in given.items() if value is not None for w in (name, value))]


def _with_masters(asked: Gathering, options: Conversion) -> Conversion:
    """`--master` and `--dtype float32` are one wish.

    Raises:
        UsageError: `--master` with another dtype (`usage`).
    """
    if not asked.master:
        return options
    if options.dtype is not None and DType.parse(options.dtype) is not DType.F32:
        raise UsageError("usage", f"--master keeps fp32, and --dtype says {options.dtype}; give one")
    return dataclasses.replace(options, dtype="float32")


def gather_recipe(asked: Gathering, options: Conversion) -> tuple[Recipe, str]:
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


def _tag_path(asked: Gathering, options: Conversion) -> tuple[str, str, str | None]:
    """The folder with the shards, as the user would write it, why it is the one, and the part inside of it."""
    from converter.sources.hub.names import as_reference, below
    from converter.sources.locate import resolve

    root = resolve(asked.src, revision=options.revision, token=options.token, in_parts=True, whole=True).path
    tag, part = place_of(root, as_reference(asked.src), tag=asked.tag, part=asked.part)
    if tag.folder == root:
        return asked.src, "", part
    return below(asked.src, root, tag.folder), f"tag {show(tag.folder.name)}: {tag.why}", part


def head(prepared: Prepared, said: str) -> list[str]:
    """The screen's lines about the shards, the tag that was chosen, and the base."""
    from converter.cli import lines as report

    source = prepared.opened[SOURCE]
    words = report.dtype_words(source)
    lines = [report.line("shards", f"{show(source.origin.asked)}  {source.origin.stored_format}, {words}")]
    if said:
        lines.append(report.line("", said))
    if "base" in prepared.opened:
        lines.append(report.base_line("base", prepared.opened["base"], recorded="base" in prepared.recorded))
    return lines


def next_commands(written: Written, asked: Gathering) -> list[str]:
    """The check, then what loads the result."""
    from converter.cli.run.folder import load_commands

    if written.prepared.checkpoint.origin.kind != "adapter":
        return load_commands(written)
    out = shlex.quote(written.out)
    base = written.prepared.checkpoint.config.get("base_model_name_or_path")
    named = [] if isinstance(base, str) and base and asked.base is None else ["--base", asked.base or "BASE"]
    merge = shlex.join(["rlhf-convert", "merge-lora", written.out, f"{written.out.rstrip('/')}-merged", *named])
    return [f"rlhf-convert inspect {out}", merge]
