"""What `convert` and its two presets do: find what SRC is, and build one recipe from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Unpack

from converter.converters.heads.detect import head_like
from converter.core.files.names import ADAPTER_PICKLED, ADAPTER_WEIGHTS
from converter.diagnostic import Again, Steps
from converter.dialects.known import Target, target
from converter.dialects.spec import Role
from converter.errors import ConvertError, UsageError
from converter.recipe.options import MEGATRON_LAYOUTS, Going, HeadOptions
from converter.recipe.recipe import SOURCE, Output, Recipe, Step
from converter.recipe.verbs.allowing import allowing
from converter.recipe.verbs.conversion import Conversion, convert_recipe
from converter.recipe.verbs.knobs import HeadWriting, Where, optional, options_of
from converter.recipe.verbs.pieces import cast_steps, output
from converter.recipe.verbs.run_state import for_role, place_of, with_recorded_base
from converter.sources.opening import InputSpec, input_spec
from converter.text import show

T = TypeVar("T")
Kind = Literal["model", "adapter", "training"]


@dataclass(frozen=True)
class Found:
    """What the user means by SRC: its kind, the folder as they would write it, and how it was chosen.

    Attributes:
        part: which model, where the state's tensors are those of two.
        recorded: the base of a state is the one that its run records.
    """

    kind: Kind
    path: str
    said: str = ""
    damaged: bool = False
    part: str | None = None
    recorded: bool = False


@dataclass(frozen=True)
class ConvertRequest:
    """What the user asked for; `verb` is what errors call it."""

    src: str
    to: str
    role: Role = "critic"
    verb: str = "convert"

    @property
    def aim(self) -> Target:
        """The trainer that is to read it."""
        return target(self.to, self.role)


@dataclass(frozen=True, kw_only=True)
class Converted(Conversion):
    """A model of one trainer made into one of another: what the source was, and who reads the output."""

    request: ConvertRequest
    found: Found


def convert(
    src: Where, out: Where | None = None, *, to: str, role: Role = "critic", **writing: Unpack[HeadWriting]
) -> Converted:
    """Make a reward model, critic or actor of one trainer into one of another: gathered, merged, remapped in one pass.

    Args:
        src: a model, an adapter, a trainer's state, a run, or a name on the Hub.
        out: the folder to write, `hf://owner/name` or `s3://bucket/folder`; None: only plan.
        to: `TRAINER` or `TRAINER@VERSION`.
        role: `reward`, `critic` or `actor`: what that trainer uses it as.
        writing: see `HeadWriting`; `from_` is the trainer or dialect of the source.

    Raises:
        UsageError: an unknown trainer, or several checkpoints or models to choose from.
        Refused: the head is lost, or something else; nothing is on the disk.
        VerificationFailed: what was written is not what it should be; it is not published.
    """
    options, going = options_of(HeadOptions, writing)
    return converted(ConvertRequest(str(src), to, role), optional(out), options, going)


def rm_to_critic(src: Where, out: Where | None = None, *, to: str, **writing: Unpack[HeadWriting]) -> Converted:
    """Make a reward model of any trainer into the critic that another begins with: `convert` with `role="critic"`."""
    options, going = options_of(HeadOptions, writing)
    return converted(ConvertRequest(str(src), to, "critic", "rm-to-critic"), optional(out), options, going)


def critic_to_rm(src: Where, out: Where | None = None, *, to: str, **writing: Unpack[HeadWriting]) -> Converted:
    """Make a critic of any trainer into a reward model of another: `convert` with `role="reward"`."""
    options, going = options_of(HeadOptions, writing)
    return converted(ConvertRequest(str(src), to, "reward", "critic-to-rm"), optional(out), options, going)


def converted(request: ConvertRequest, out: str | None, options: HeadOptions, going: Going) -> Converted:
    """What `convert` and its presets do, of plain values."""

    def attempt(state: Found, recipe: Recipe) -> Converted:
        return convert_recipe(
            recipe, out, options, going,
            lambda p: Converted(prepared=p, options=options, request=request, found=state),
        )  # fmt: skip

    with allowing(options.allow_name):
        return each_recipe(request, options, attempt)


def each_recipe(request: ConvertRequest, options: HeadOptions, attempt: Callable[[Found, Recipe], T]) -> T:
    """Call `attempt` with the recipe that the arguments mean, and again with the base that a run records, if needed.

    Raises:
        ConvertError: what `attempt` raised, with where lost tensors were looked for.
    """
    looked: list[str] = []
    found: Found | None = None
    aim = request.aim

    def with_base(recorded: bool) -> T:
        assert found is not None
        places, looked[:] = lost_and_found(found, options)
        state = dataclasses.replace(found, recorded=recorded)
        return attempt(state, remap_recipe(state, request.to, request.role, aim, options, places, request.verb))

    try:
        found = find(request.src, options)
        return with_recorded_base(with_base, given=found.kind != "training" or options.base is not None)
    except ConvertError as error:
        for_role(error, request.role)
        if error.code == "head-missing" and found is not None and found.kind == "training":
            fresh = Again(("--init-head", "zeros"))
            error.next = Steps("name the model of the run that has a head; for a fresh critic: ", fresh)
        if error.code == "head-base-lost" and looked and error.got is None:
            error.got = "looked: " + "; ".join(looked)
        raise


def find(src: str, options: HeadOptions) -> Found:
    """What lies at SRC.

    Raises:
        UsageError: nothing that is read, or several checkpoints to choose from.
    """
    from converter.sources.finding import kind_of, nothing_in, sources
    from converter.sources.hub.names import as_reference, below
    from converter.sources.locate import resolve

    spec = input_spec(src, options.revision)
    assert spec.path is not None
    root = resolve(spec.path, revision=spec.revision, token=options.token, in_parts=True).path
    name = kind_of(root)
    kind = None if name is None else sources()[name].kind
    is_plain = kind in ("model", "adapter")
    if name is not None and is_plain and (_has_weights(root) or not _has_shards(root, src)):
        _refuse_run_options(src, options, is_adapter=kind == "adapter")
        return Found("adapter" if kind == "adapter" else "model", src, damaged=_is_damaged(root, name))
    part = options.part
    try:
        place, inner = place_of(root, as_reference(src), tag=options.tag, part=part)
    except UsageError as error:
        below_it = nothing_in(root, src) if error.code == "no-shards" and name is None else error
        raise below_it if below_it.code == "several-checkpoints" else error from None
    if place.folder == root:
        return Found("training", src, part=inner)
    path = below(src, root, place.folder)
    return Found("training", path, f"tag {show(place.folder.name)}: {place.why}", part=inner)


def _refuse_run_options(src: str, options: HeadOptions, *, is_adapter: bool) -> None:
    """Options that choose inside a trainer's state say nothing of a model or an adapter, but for an adapter's alpha."""
    alpha = None if is_adapter else options.lora_alpha
    given = {"--part": options.part, "--tag": options.tag, "--lora-alpha": alpha}
    named = [name for name, value in given.items() if value is not None]
    if named:
        what = f"{' and '.join(named)} goes with a trainer's state, and this is a model or an adapter"
        raise UsageError("usage", what, where=show(src))


def _has_weights(root: Path) -> bool:
    """True where weights lie in the folder itself, or in ColossalChat's `modeling/`; those are then what is meant."""
    from converter.sources.hf.colossalchat import FOLDER
    from converter.sources.survey import file_names, is_weights_of_model

    names = file_names(root)
    inside = file_names(root / FOLDER) if (root / FOLDER).is_dir() else ()
    return is_weights_of_model(names) or bool({ADAPTER_WEIGHTS, ADAPTER_PICKLED} & names) or is_weights_of_model(inside)


def _is_damaged(root: Path, kind: str) -> bool:
    """True where tensors are empty or missing, or a head has a LoRA and perhaps no weight below it."""
    from converter.sources.finding import sources
    from converter.sources.hf.broken import LOST

    survey = sources()[kind].survey(root)
    lora = [n.partition(".lora_")[0] for n in survey.entries if ".lora_" in n]
    return any(f.code in LOST for f in survey.faults) or bool(head_like(f"{n}.weight" for n in lora))


def _has_shards(root: Path, src: str) -> bool:
    """True for a run's folder, whose config lies above a trainer's shards."""
    from converter.sources.finding import find_place

    try:
        find_place(root, src)
    except ConvertError as error:
        return error.code != "no-shards"
    return True


def remap_recipe(
    found: Found,
    to: str,
    role: Role,
    aim: Target,
    options: HeadOptions,
    places: Mapping[str, InputSpec],
    verb: str,
) -> Recipe:
    """The recipe that the arguments mean: gather where there are shards, merge where there is an adapter, remap."""
    inputs: dict[str, InputSpec] = {}
    fields = head_fields(to, role, options)
    steps: list[Step] = []
    base = None if options.base is None else input_spec(options.base)
    source = input_spec(found.path, options.revision)
    if places:
        fields["weights"] = list(places)
        source = dataclasses.replace(source, broken=True)
    if found.kind == "adapter":
        inputs[SOURCE] = base or InputSpec(base_of="adapter")
        inputs["adapter"] = source
        fields["adapter"] = "adapter"
        fields |= {} if options.lora_alpha is None else {"lora-alpha": options.lora_alpha}
    else:
        inputs[SOURCE] = source
        if base is not None:
            inputs["base"] = base
        elif found.recorded:
            inputs["base"] = InputSpec(base_of=SOURCE)
        if "base" in inputs:
            fields["base"] = "base"
    if found.kind == "training":
        given = {"lora-alpha": options.lora_alpha, "base": fields.get("base"), "part": found.part}
        given |= {"dequantize": True} if options.dequantize else {}
        steps.append(Step("gather", {"emit": "merged", **{k: v for k, v in given.items() if v is not None}}))
    elif options.dequantize:
        steps.append(Step("dequantize", {}))
    steps += [Step("remap-head", fields), *cast_steps(options), *_laid_out(aim, options)]
    return Recipe({**inputs, **places}, tuple(steps), _output(aim, options), file=verb)


def _laid_out(aim: Target, options: HeadOptions) -> list[Step]:
    """The step that makes a trainer's own files, where it has some.

    Raises:
        UsageError: ranks for a trainer that reads a folder of transformers' (`usage`).
    """
    asked = {word: getattr(options, word) for word in ("tp", "pp", "ep", "etp", "modules")}
    fields = {word: value for word, value in asked.items() if value is not None}
    if not aim.serves.lays_out:
        if fields:
            what = f"--{next(iter(fields))} goes with --to megatron; {aim.words} loads a model on any number of ranks"
            raise UsageError("usage", what)
        return []
    if options.layout is not None and options.layout in MEGATRON_LAYOUTS:
        fields["layout"] = options.layout.value
    if "modules" in fields and fields.get("layout") != "legacy":
        raise UsageError("usage", "--modules goes with --layout legacy: a torch_dist checkpoint loads into any")
    return [Step(aim.serves.lays_out, fields)]


def lost_and_found(found: Found, options: HeadOptions) -> tuple[dict[str, InputSpec], list[str]]:
    """Where lost tensors may still be: where the user points, and for a damaged folder what lies around it.

    The second list says, in words, where there was nothing.

    Raises:
        UsageError: places for a run's own shards (`usage`), or folders that are not there.
    """
    given = options.weights_from
    if found.kind == "training" and given:
        what = "a run's own shards are gathered; --weights-from is for folders that lost tensors"
        raise UsageError("usage", what, where=show(found.path))
    if not given and not found.damaged:
        return {}, []
    from converter.recipe.verbs.repair_places import search
    from converter.sources.hub.names import as_reference

    result = search(as_reference(found.path, options.revision), given, token=options.token)
    places = {f"weights-{n}": InputSpec(p.path, broken=p.is_copy) for n, p in enumerate(result.places, 1)}
    return places, result.looked


def head_fields(to: str, role: Role, options: HeadOptions) -> dict[str, Any]:
    """The fields of the step `remap-head`, those that say something.

    Raises:
        UsageError: weights that are no numbers (`usage`).
    """
    fields: dict[str, Any] = {"to": to, "role": role}
    weights = None if options.label_weights is None else _weights(options.label_weights)
    init = options.init_head
    given: dict[str, Any] = {"read-as": options.source, "head": options.head, "label": options.label}
    given |= {"label-weights": weights, "init-head": init}
    if options.bias != "refuse":
        given["bias"] = options.bias
    if options.normaliser != "fold":
        given["normaliser"] = options.normaliser
    if options.seed:
        given["seed"] = options.seed
    return fields | {k: v for k, v in given.items() if v is not None}


def _weights(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        what = f"--label-weights takes numbers with commas between them, not {show(text)}"
        raise UsageError("usage", what, expected="--label-weights=-1,1") from None


def _output(aim: Target, options: HeadOptions) -> Output:
    """The layout; a trainer that reads one file gets one.

    Raises:
        UsageError: a layout of several files for such a trainer (`usage`).
    """
    if aim.dialect.one_file and (options.max_shard_size is not None or options.layout is not None):
        raise UsageError(
            "usage", f"{aim.words} reads one weight file: --max-shard-size and --layout have no place here"
        )
    if aim.serves.lays_out and options.layout in MEGATRON_LAYOUTS:
        options = dataclasses.replace(options, layout=None)
    return output(options)
