"""Opens a recipe's inputs, applies its steps and plans the output. No tensor is read but what a converter asks for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converter.converters.finding import Converter
from converter.converters.merge.merge_lora import MergeLora
from converter.core.checkpoint import ADAPTER, MODEL, TRAINING, Checkpoint
from converter.core.compute.finite import ZEROS
from converter.core.context import Context
from converter.core.files import sparse
from converter.core.formats.pickle_names import CODE as NAMES
from converter.core.formats.pickle_names import allowed_names
from converter.core.formats.safetensors_io import Header, read_header
from converter.core.tensors.nodes import Filled, LazyTensor
from converter.core.writer.accounting import unaccounted
from converter.core.writer.plan import Plan, make_plan
from converter.diagnostic import Again, Command, Steps, as_argument
from converter.errors import Refused, UsageError
from converter.examine.gate import expect_adapter_fits, expect_consistent, expect_whole, expect_whole_adapter
from converter.families.never_zero import never_zero
from converter.recipe.fields import check, config_will_do, instantiate
from converter.recipe.recipe import SOURCE, Probe, Recipe
from converter.sources.opening import compare_base, open_checkpoint, open_recorded_base
from converter.text import fold, show
from converter.version import __version__

DEVICE = "device"
"""What says in the receipt on which model of device kernels computed."""


@dataclass(frozen=True)
class Prepared:
    """All that is known before the first byte is written.

    Attributes:
        opened: the inputs by name.
        recorded: names of inputs that were not given but recorded in an adapter.
        checkpoint: what came out of the last step.
    """

    recipe: Recipe
    opened: Mapping[str, Checkpoint]
    recorded: frozenset[str]
    checkpoint: Checkpoint
    plan: Plan
    context: Context


def prepare(
    recipe: Recipe,
    *,
    allow: frozenset[str],
    token: str | None = None,
    keep_code: bool = False,
    device: str = "cpu",
    told: Callable[[str], None] | None = None,
) -> Prepared:
    """Everything up to the plan: check the recipe, open its inputs, apply its steps, lay the output out.

    Args:
        device: where kernels compute: `cpu`, `cuda`, `cuda:N`, or `auto` for a CUDA device where one is there.
        told: hears, a line at a time, how far a probe is.

    Raises:
        UsageError: the recipe or an input's path is wrong.
        Refused: an input is broken, a converter refuses, an input tensor would be lost (`unaccounted`), or what
            would be written is not the model that its loader asks for (see `gate`).
    """
    check(recipe)
    context = Context(allow, evaluate=_evaluated)
    everything = open_inputs(recipe, token=token, keep_code=keep_code)
    against = None if recipe.probe is None else recipe.probe.against_base
    opened = {name: each for name, each in everything.items() if name != against}
    if (allowed := allowed_names()) is not None and allowed.used:
        context.consents[NAMES] = f"names that pickled files mention, read as data: {fold(sorted(allowed.used))}"
    recorded = frozenset(n for n, s in recipe.inputs.items() if s.base_of is not None)
    for name, other in opened.items():
        is_over_base = other.origin.kind == ADAPTER and opened[SOURCE].origin.kind != ADAPTER
        if name != SOURCE and is_over_base and SOURCE not in recorded:
            compare_base(opened[SOURCE], other, context)
    converters = instantiate(recipe, everything)
    befores = list(_applied(converters, opened, context))
    checkpoint, is_laid_out = befores.pop(), any(getattr(c, "lays_out", False) for c in converters)
    for name, other in opened.items():
        if not recipe.inputs[name].broken:
            expect_consistent(other, list(opened.values()), context)
        if name != SOURCE:
            expect_whole_adapter(other, opened[SOURCE], context)
    if checkpoint.origin.kind == TRAINING:
        raise Refused(
            "not-a-model",
            "a trainer's state has to be gathered before it is a model",
            where=show(checkpoint.origin.asked),
            next=Command("gather", (checkpoint.origin.asked, "OUT")),
        )
    checkpoint = checkpoint.replace(checks=tuple(c for each in opened.values() for c in each.checks))
    sparse.expect_all_read()
    if lost := unaccounted(list(opened.values()), checkpoint):
        raise Refused("unaccounted", f"tensors of the inputs would be lost: {lost}")
    if not is_laid_out:
        expect_whole(checkpoint, context)
    expect_adapter_fits(checkpoint, list(opened.values()), context)
    place, measured = _device(device, recipe, checkpoint, context), {}
    if recipe.probe is not None:
        merge = next((c, b) for c, b in zip(converters, befores, strict=True) if isinstance(c, MergeLora))
        measured = _probed(recipe.probe, merge, checkpoint, everything, context, told, place)
    _expect_links_can_be(recipe)
    plan = make_plan(
        checkpoint,
        context=context,
        max_shard_size=recipe.output.max_shard_size,
        layout=recipe.output.layout,
        provenance=_provenance(recipe, everything, checkpoint.repaired) | measured | _made_on(place),
        linkable=_linkable(checkpoint) if recipe.output.link_unchanged else None,
    )
    plan = dataclasses.replace(plan, device=place)
    return Prepared(recipe, opened, recorded, checkpoint, plan, context)


def _expect_links_can_be(recipe: Recipe) -> None:
    """Refuse links to files that are laid out anew (`link-layout`)."""
    output = recipe.output
    if output.link_unchanged and (output.layout == "pack" or output.max_shard_size is not None):
        what = "files that are linked stay as they are, and a size or the layout `pack` lays them out anew"
        raise UsageError("link-layout", what, where=recipe.file, next="leave --max-shard-size and --layout pack out")


def _device(asked: str, recipe: Recipe, checkpoint: Checkpoint, context: Context) -> str | None:
    """The device that the plan's kernels compute on, as `cuda:0`; None for the CPU, with a note where it was not asked.

    Raises:
        UsageError: no such device, or PEFT's own roundings were asked for elsewhere than on the CPU (`usage`).
    """
    if asked == "cpu":
        return None
    from converter.core.compute.device import chosen, suits

    found = chosen(asked)
    if any(step.fields.get("numerics") == "peft" for step in recipe.steps):
        if asked == "auto":
            return None
        what = "PEFT's bits are known of the CPU alone: --numerics peft computes there"
        raise UsageError("usage", what, expected="--device cpu, or --numerics best")
    if asked == "auto" and found is None:
        return None
    if not any(map(suits, checkpoint.all_tensors())):
        context.note("info", "device", f"--device {asked}: nothing of this is computed by what runs on a device")
        return None
    if found is None:
        context.note("info", "device", f"--device {asked}: no CUDA device answers here, so all is computed on the CPU")
    return found


def _made_on(device: str | None) -> dict[str, str]:
    """What the receipt says of a device: its model, on which last bits depend, and not its number."""
    if device is None:
        return {}
    from converter.core.compute.device import model_of

    return {DEVICE: model_of(device)}


def _applied(
    converters: Sequence[Converter], opened: Mapping[str, Checkpoint], context: Context
) -> Iterator[Checkpoint]:
    """The checkpoint before each step, and at the end."""
    checkpoint = opened[SOURCE]
    for converter in converters:
        yield checkpoint
        if getattr(converter, "lays_out", False):
            # What it makes has names that no class of transformers asks for.
            expect_whole(checkpoint, context)
        if getattr(converter, "compares_models", False):
            # What one of the two lacks would be no difference, and no difference is written.
            for each in opened.values():
                expect_whole(each, context)
        checkpoint = converter(checkpoint, context)
    yield checkpoint


def _probed(
    probe: Probe,
    merge: tuple[MergeLora, Checkpoint],
    result: Checkpoint,
    opened: Mapping[str, Checkpoint],
    context: Context,
    told: Callable[[str], None] | None,
    device: str | None,
) -> dict[str, Any]:
    """What the receipt has of a probe; what the screen has are notes."""
    from converter.examine.verify.merge_probe import MergeProbe, measure

    converter, base = merge
    other = None if probe.against_base is None else opened[probe.against_base]
    asked = MergeProbe(probe.file, probe.pairs, converter, opened[SOURCE], base, result, other, context.allow, device)
    found = measure(asked, told or (lambda text: None))
    for text in found.texts:
        context.note("info", "probe", text)
    return {"probe": dict(found.figures)}


def _evaluated(tensor: LazyTensor) -> bytes:
    from converter.core.compute.evaluate import to_bytes

    return to_bytes(tensor)


def _linkable(checkpoint: Checkpoint) -> dict[str, Header]:
    """Headers of the input files that links may be made to.

    Raises:
        UsageError: they are on the Hub, and gone when the run ends (`link-remote`).
    """
    files = [path for path in checkpoint.inputs if path.endswith(".safetensors")]
    if any(sparse.at(path) is not None for path in files):
        what = "files that are read from the Hub are not here to be linked to"
        raise UsageError(
            "link-remote",
            what,
            next=Steps(Command("download", (checkpoint.origin.name,), program="hf"), ", then ", Again()),
        )
    return {path: read_header(Path(path)) for path in files}


def look_at_values(prepared: Prepared, measures: Mapping[str, Mapping[str, float]]) -> None:
    """The last look at what was written, by what was measured of its values, before it is published.

    Raises:
        Refused: a merge's result is its base (`no-op`), or tensors of a model are zero everywhere that no trained model
            has so (`zero-tensors`), without consent.
    """
    _refuse_no_op(prepared, measures)
    _refuse_zeros(prepared, measures)


def _refuse_zeros(prepared: Prepared, measures: Mapping[str, Mapping[str, float]]) -> None:
    if prepared.checkpoint.origin.kind != MODEL:
        return
    infos = {e.name: e.tensor.info for e in prepared.plan.entries if not isinstance(e.tensor, Filled)}
    zero = [n for n, info in infos.items() if info.numel and measures.get(n, {}).get(ZEROS) == info.numel]
    if found := never_zero(infos, zero):
        count = "1 tensor is" if len(found) == 1 else f"{len(found)} tensors are"
        what = f"{count} zero everywhere, which no trained model has: {fold(found)}"
        source = prepared.opened[SOURCE].origin.asked if SOURCE in prepared.opened else None
        deep = None if source is None else Command("doctor", (as_argument(source), "--deep"))
        prepared.context.consent(Refused("zero-tensors", what, next=deep))


def _refuse_no_op(prepared: Prepared, measures: Mapping[str, Mapping[str, float]]) -> None:
    """Stop a merge whose result is the base, bit by bit: nobody asks for that."""
    adapters = {c.origin.path for c in prepared.opened.values() if c.origin.kind == ADAPTER}
    merged = [m for m in measures.values() if "effective" in m]
    is_difference = any(step.name in ("make-delta", "apply-delta") for step in prepared.recipe.steps)
    # A product of the change with itself is zero only where every value is what it was; NaN is not a zero. Of a weight
    # that is written back quantised the scales move by a last bit with nothing: there the codes count.
    if not (adapters or is_difference) or not merged or any(m.get("codes_changed", m["effective"]) for m in merged):
        return
    copied = (run.file for e in prepared.plan.entries if e.runs is not None for run in e.runs)
    if not any(str(Path(file).parent) in adapters for file in copied):
        why = "the difference is zero, or" if is_difference else "the update is"
        what = f"none of {len(merged)} merged tensors differs from the base: {why} lost in rounding"
        prepared.context.consent(Refused("no-op", what))


def open_inputs(recipe: Recipe, *, token: str | None, keep_code: bool) -> dict[str, Checkpoint]:
    """Every input as a checkpoint; those that an adapter records come after the adapters."""
    opened: dict[str, Checkpoint] = {}
    configs = config_will_do(recipe)
    for name, spec in sorted(recipe.inputs.items(), key=lambda item: item[1].base_of is not None):
        if spec.base_of is None:
            opened[name] = open_checkpoint(spec, token=token, keep_code=keep_code, config_alone=name in configs)
        else:
            if spec.base_of not in opened:
                what = f"`{show(name)}` is the base of `{show(spec.base_of)}`, which is a base itself"
                raise UsageError("recipe", what, where=recipe.file, expected="the name of an adapter's input")
            adapter = opened[spec.base_of]
            opened[name] = open_recorded_base(adapter, keep_code=keep_code, config_alone=name in configs)
    return {name: opened[name] for name in recipe.inputs}


def _provenance(recipe: Recipe, opened: Mapping[str, Checkpoint], repaired: Mapping[str, str]) -> dict[str, Any]:
    """What the receipt says of a run's origin: names, revisions and digests, no path of this machine."""
    inputs = {
        name: {
            "kind": c.origin.kind,
            "name": c.origin.name,
            "revision": c.origin.revision,
            "header_digest": c.origin.header_digest,
        }
        for name, c in opened.items()
    }
    made = {"steps": recipe.steps_to_value(), "output": recipe.output_to_value()}
    told = {"repaired": dict(repaired)} if repaired else {}
    return {"version": __version__, "recipe": made, "inputs": inputs, **told}
