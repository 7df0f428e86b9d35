"""`rlhf-convert convert`, `rm-to-critic` and `critic-to-rm`: one recipe, from whatever the source is."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from converter.cli.run import folder as conversion
from converter.cli.run.hub import as_loaders_take_it, is_on_hub
from converter.converters.heads.detect import head_like
from converter.dialects.known import Target, target
from converter.dialects.spec import Role
from converter.errors import ConvertError, UsageError
from converter.recipe.recipe import SOURCE, Output, Recipe, Step
from converter.recipe.verbs.pieces import cast_steps, output
from converter.recipe.verbs.run_state import corrected, place_of, with_recorded_base
from converter.sources.opening import InputSpec, input_spec
from converter.text import show

if TYPE_CHECKING:
    from converter.cli.run.folder import Written
    from converter.cli.verbs.heads import Remapping
    from converter.recipe.run import Prepared

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


def convert(src: str, out: str | None, to: str, role: Role, options: Remapping, verb: str = "convert") -> int:
    """Convert a model into the one that a trainer reads in a role."""
    aim = target(to, role)
    looked: list[str] = []
    found: Found | None = None

    def attempt(recorded: bool) -> int:
        assert found is not None
        places, said = lost_and_found(found, options)
        looked[:] = said
        state = dataclasses.replace(found, recorded=recorded)
        return conversion.convert(
            remap_recipe(state, to, role, aim, options, places, verb),
            out,
            options,
            head=lambda prepared: head(prepared, state),
            next_commands=lambda written: next_commands(written, aim, to, src, state, options),
        )

    try:
        found = find(src, options)
        return with_recorded_base(attempt, given=found.kind != "training" or options.base is not None)
    except ConvertError as error:
        command = _command(src, out, to, role, verb, options)
        corrected(error, command, role=role)
        if error.next is not None and error.next.startswith("--"):
            # What a converter says of its own fields is the end of a command with the user's paths.
            error.next = f"{shlex.join(command)} {error.next}"
        if error.code == "head-missing" and found is not None and found.kind == "training":
            error.next = f"name the model of the run that has a head; for a fresh critic: {shlex.join(command)} "
            error.next += "--init-head zeros"
        if error.code == "head-base-lost" and looked and error.got is None:
            error.got = "looked: " + "; ".join(looked)
        raise


def _command(src: str, out: str | None, to: str, role: Role, verb: str, options: Remapping) -> list[str]:
    """The command that was given, with what it says of SRC."""
    words = ["rlhf-convert", verb, src, out or "OUT", "--to", to]
    words += ["--role", role] if verb == "convert" else []
    part = None if options.part is None else options.part.value
    given = {"--from": options.source, "--tag": options.tag, "--part": part, "--base": options.base}
    return [*words, *(w for name, value in given.items() if value is not None for w in (name, value))]


def find(src: str, options: Remapping) -> Found:
    """What lies at SRC.

    Raises:
        UsageError: nothing that is read, or several checkpoints to choose from.
    """
    from converter.sources.finding import kind_of, sources
    from converter.sources.hub.names import as_reference, below
    from converter.sources.locate import resolve

    spec = input_spec(src, options.revision)
    assert spec.path is not None
    root = resolve(spec.path, revision=spec.revision, token=options.token, in_parts=True).path
    kind = kind_of(root)
    is_plain = kind is not None and getattr(sources()[kind], "precedence", 0) == 0
    if is_plain and (_has_weights(root) or not _has_shards(root, src)):
        assert kind is not None
        _refuse_run_options(src, options)
        return Found("adapter" if kind == "peft" else "model", src, damaged=_is_damaged(root, kind))
    part = None if options.part is None else options.part.value
    place, inner = place_of(root, as_reference(src), tag=options.tag, part=part)
    if place.folder == root:
        return Found("training", src, part=inner)
    path = below(src, root, place.folder)
    return Found("training", path, f"tag {show(place.folder.name)}: {place.why}", part=inner)


def _refuse_run_options(src: str, options: Remapping) -> None:
    """Options that choose inside a trainer's state say nothing of a model or an adapter."""
    given = {"--part": options.part, "--tag": options.tag, "--lora-alpha": options.lora_alpha}
    named = [name for name, value in given.items() if value is not None]
    if named:
        what = f"{' and '.join(named)} goes with a trainer's state, and this is a model or an adapter"
        raise UsageError("usage", what, where=show(src))


def _has_weights(root: Path) -> bool:
    """True where weights lie in the folder itself, or in ColossalChat's `modeling/`; those are then what is meant."""
    from converter.sources.hf.colossalchat import FOLDER
    from converter.sources.survey import ADAPTER_PICKLED, ADAPTER_WEIGHTS, file_names, is_weights_of_model

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
    options: Remapping,
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
        steps.append(Step("gather", {"emit": "merged", **{k: v for k, v in given.items() if v is not None}}))
    steps += [Step("remap-head", fields), *cast_steps(options)]
    return Recipe({**inputs, **places}, tuple(steps), _output(aim, options), file=verb)


def lost_and_found(found: Found, options: Remapping) -> tuple[dict[str, InputSpec], list[str]]:
    """Where lost tensors may still be: where the user points, and for a damaged folder what lies around it.

    The second list says, in words, where there was nothing.

    Raises:
        UsageError: places for a run's own shards (`usage`), or folders that are not there.
    """
    given = options.weights_from or []
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


def head_fields(to: str, role: Role, options: Remapping) -> dict[str, Any]:
    """The fields of the step `remap-head`, those that say something.

    Raises:
        UsageError: weights that are no numbers (`usage`).
    """
    fields: dict[str, Any] = {"to": to, "role": role}
    weights = None if options.label_weights is None else _weights(options.label_weights)
    init = None if options.init_head is None else options.init_head.value
    given = {"read-as": options.source, "label": options.label, "label-weights": weights, "init-head": init}
    if options.bias.value != "refuse":
        given["bias"] = options.bias.value
    if options.normaliser.value != "fold":
        given["normaliser"] = options.normaliser.value
    if options.seed:
        given["seed"] = options.seed
    return fields | {k: v for k, v in given.items() if v is not None}


def _weights(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        what = f"--label-weights takes numbers with commas between them, not {show(text)}"
        raise UsageError("usage", what, expected="--label-weights=-1,1") from None


def _output(aim: Target, options: Remapping) -> Output:
    """The layout; a trainer that reads one file gets one.

    Raises:
        UsageError: a layout of several files for such a trainer (`usage`).
    """
    if aim.dialect.one_file and (options.max_shard_size is not None or options.layout is not None):
        raise UsageError(
            "usage", f"{aim.words} reads one weight file: --max-shard-size and --layout have no place here"
        )
    return output(options)


def head(prepared: Prepared, found: Found) -> list[str]:
    """The screen's lines about the inputs."""
    from converter.cli import lines as report

    lines = []
    for name, checkpoint in prepared.opened.items():
        if checkpoint.origin.kind == "adapter":
            lines.append(report.adapter_line(checkpoint))
        else:
            label = "base" if found.kind == "adapter" and name == SOURCE else name.partition("-")[0]
            lines.append(report.base_line(label, checkpoint, recorded=name in prepared.recorded))
    lines += report.repaired_lines(prepared.checkpoint.repaired)
    return lines + ([report.line("", found.said)] if found.said else [])


def next_commands(written: Written, aim: Target, to: str, src: str, found: Found, options: Remapping) -> list[str]:
    """The proof, the trainer's launch line, and what goes wrong with it although the files are right."""
    path = written.out if Path(written.out).is_absolute() else f"./{Path(written.out)}"
    if is_on_hub(written.out):
        path = as_loaders_take_it(written.out)
    verify = ["rlhf-convert", "verify", written.out, "--for", to, "--role", aim.role]
    if found.part is None and not written.prepared.checkpoint.repaired:  # what was lost in SRC can't be compared with
        verify += ["--against", found.path if found.kind == "training" else src]
        base = options.base or _recorded(written)
        verify += ["--base", base] if base is not None else []
    commands = [shlex.join(verify)]
    if aim.serves.launch:
        commands.append(aim.serves.launch.replace("{out!r}", repr(path)).replace("{out}", shlex.quote(path)))
    return [*commands, *(f"# {trap}" for trap in aim.traps)]


def _recorded(written: Written) -> str | None:
    """The base that a run recorded, where it was used; an adapter's own is found again."""
    used = "base" in written.prepared.recorded
    return written.prepared.opened["base"].origin.asked if used else None
