"""What `repair` does: the fixes of doctor's findings, and lost tensors from where they still exist."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from converter.core.files.names import ADAPTER_CONFIG, ADAPTER_STEM
from converter.errors import ConvertError, Refused, UsageError
from converter.recipe.options import Going, WriteOptions
from converter.recipe.recipe import SOURCE, Recipe, Step
from converter.recipe.verbs.allowing import allowing
from converter.recipe.verbs.conversion import Conversion, convert_recipe, prepared_of
from converter.recipe.verbs.gather import Gathered, GatherRequest, gather_command, gather_recipe, gathered
from converter.recipe.verbs.knobs import Where, Writing, optional, options_of
from converter.recipe.verbs.pieces import cast_steps, output
from converter.recipe.verbs.two_outputs import convert_both
from converter.sources.opening import InputSpec, input_spec
from converter.text import show

if TYPE_CHECKING:
    from converter.diagnostic import Next
    from converter.recipe.run import Prepared
    from converter.recipe.verbs.repair_fixes import Fixes
    from converter.recipe.verbs.repair_places import Search


@dataclass(frozen=True)
class RepairRequest:
    """What the user asked for."""

    src: str
    weights_from: tuple[str, ...] = ()
    base: str | None = None
    target: str | None = None
    lora_alpha: float | None = None
    vocab: str | None = None
    weights: str | None = None
    emit: str | None = None


@dataclass(frozen=True, kw_only=True)
class Repaired(Conversion):
    """A repaired folder.

    Attributes:
        fixes: what is fixed beside lost tensors, and what is left.
        is_whole: no tensor was lost: names, config and the like are fixed, and no value.
    """

    fixes: Fixes
    is_whole: bool = False


@dataclass(frozen=True)
class Sound:
    """A folder in which there is nothing to repair.

    Attributes:
        what: why, in words; `next` what to do then.
        left: findings that would be fixed with consent, and the code to consent to.
        not_compared: why names and shapes were not compared with what a load asks for; empty where they were.
    """

    what: str
    next: Next | None
    left: tuple[tuple[str, str], ...]
    not_compared: str = ""


def repair(
    src: Where,
    out: Where | None = None,
    *,
    weights_from: Sequence[Where] = (),
    base: Where | None = None,
    for_: str | None = None,
    lora_alpha: float | None = None,
    vocab: str | int | None = None,
    set: str | None = None,
    emit: str | None = None,
    **writing: Unpack[Writing],
) -> Repaired | Gathered | Sound:
    """Fill what is empty or lost from where it still exists, and fix what else doctor finds, where that is safe.

    A folder without any weight file beside a run's shards is gathered (`Gathered`); of a folder in which nothing is
    wrong nothing is written (`Sound`).

    Args:
        src: a model or an adapter.
        out: the folder to write, `hf://owner/name` or `s3://bucket/folder`; None: only plan.
        weights_from: where lost weights may be: shards, a run, a copy.
        base: None: what is recorded, if it is at hand.
        for_: `transformers@4` adds old spellings.
        lora_alpha: merges LoRA layers left in a full model, with this alpha; `emit` says what is written of them.
        vocab: `rows`, `tokenizer` or a number of rows: reconcile the vocabulary.
        set: of several sets of weight files, that of this file.
        writing: see `Writing`.

    Raises:
        Refused: what was lost exists nowhere, or an error would be in the output too; nothing is on the disk.
        VerificationFailed: what was written is not what it should be; it is not published.
    """
    options, going = options_of(WriteOptions, writing)
    request = RepairRequest(
        str(src), tuple(map(str, weights_from)), optional(base), for_, lora_alpha,
        None if vocab is None else str(vocab), set, emit,
    )  # fmt: skip
    with allowing(options.allow_name):
        return repaired(request, optional(out), options, going)


def repaired(asked: RepairRequest, out: str | None, options: WriteOptions, going: Going) -> Repaired | Gathered | Sound:
    """What `repair` does, of plain values."""
    from converter.converters.fill.refusals import NothingToRepair

    found = _look_around(asked, options)
    if found.shards is not None:
        request = GatherRequest(found.shards, base=asked.base)
        try:
            return gathered(request, out, options, going)
        except ConvertError as error:
            error.complete(gather_command(request, out))
            raise
    asked = found.asked
    if asked.emit == "both":
        return _both(found, out, options, going)
    fixes = fixes_of(asked, options)
    recipe = repair_recipe(asked, found.search, options, fixes=fixes.steps)

    def made(prepared: Prepared) -> Repaired:
        from converter.recipe.verbs.repair_fixes import NEVER_FILLED

        expect_sound(asked, fixes, only=NEVER_FILLED)
        return Repaired(prepared=prepared, options=options, fixes=fixes)

    try:
        return convert_recipe(recipe, out, options, going, made)
    except NothingToRepair as healthy:
        expect_sound(asked, fixes)
        if not fixes.codes:
            return Sound(healthy.what, healthy.next, fixes.left, fixes.not_compared)
        recipe = fix_recipe(asked, fixes, options)
        return convert_recipe(
            recipe, out, options, going,
            lambda p: Repaired(prepared=p, options=options, fixes=fixes, is_whole=True),
        )  # fmt: skip
    except Refused as error:
        looked = found.search.looked
        if looked and error.code in ("tensors-lost", "head-base-lost", "repair-mismatch", "older-weights"):
            error.got = (error.got or "nothing:") + "".join(f"\n    {each}" for each in looked)
        raise


_NAMES_FIRST = ("choose-weights", "split-lora", "fix-names", "fix-disk-names", "fix-adapter-names", "fix-ties")


def _with_vocabulary(fixes: Fixes, to: str) -> Fixes:
    """The fixes with the step that `--vocab` asks for, in place of one that only changes the config.

    Raises:
        UsageError: neither `rows`, `tokenizer` nor a number (`usage`).
    """
    if to not in ("rows", "tokenizer") and not (to.isascii() and to.isdecimal()):
        raise UsageError(
            "usage", f"--vocab {show(to)} is not a vocabulary", expected="rows, tokenizer or a number of rows"
        )
    wanted = Step("vocabulary", {"to": int(to) if to.isdecimal() else to})
    steps = [s for s in fixes.steps if s.name != "fix-vocabulary"]
    at = max((n for n, s in enumerate(steps, 1) if s.name in _NAMES_FIRST), default=0)
    left = tuple(each for each in fixes.left if each[0] != "vocabulary-rows")
    # What the gate finds in the result is refused there.
    unfixed = tuple(f for f in fixes.unfixed if f.code not in ("vocabulary-rows", "tensors-misshapen"))
    return dataclasses.replace(
        fixes,
        steps=(*steps[:at], wanted, *steps[at:]),
        codes=(*fixes.codes, "vocabulary"),
        left=left,
        unfixed=unfixed,
    )


@dataclass(frozen=True)
class _Around:
    """What lies around a folder: places that may help, and shards where there is no weight file at all."""

    asked: RepairRequest
    search: Search
    shards: str | None


def _look_around(asked: RepairRequest, options: WriteOptions) -> _Around:
    from converter.recipe.verbs.repair_places import search
    from converter.sources.hub.names import as_reference
    from converter.sources.locate import resolve

    if options.revision is not None:
        asked = dataclasses.replace(asked, src=as_reference(asked.src, options.revision))
    root = resolve(asked.src, revision=options.revision, token=options.token, in_parts=True, whole=True).path
    found = search(asked.src, asked.weights_from, token=options.token)
    return _Around(asked, found, shards_alone(root, asked, found))


def recipe_of(asked: RepairRequest, options: WriteOptions) -> Recipe:
    """The recipe that the arguments mean.

    Raises:
        UsageError: two outputs are two recipes (`usage`).
    """
    found = _look_around(asked, options)
    if found.shards is not None:
        return gather_recipe(GatherRequest(found.shards, base=asked.base), options)[0]
    fixes = fixes_of(found.asked, options)
    recipe = repair_recipe(found.asked, found.search, options, fixes=fixes.steps)
    # `fill` would stop a run that has nothing to fill.
    return fix_recipe(found.asked, fixes, options) if fixes.codes and is_whole(recipe, options) else recipe


def _both(found: _Around, out: str | None, options: WriteOptions, going: Going) -> Repaired:
    """LoRA layers left in a full model: the merged model in OUT, the adapter in OUT-adapter."""

    def planned(emit: str) -> Repaired:
        fixes = fixes_of(dataclasses.replace(found.asked, emit=emit), options)
        filling = repair_recipe(found.asked, found.search, options, fixes=fixes.steps)
        whole = is_whole(filling, options)
        recipe = fix_recipe(found.asked, fixes, options) if whole else filling
        return Repaired(prepared=prepared_of(recipe, options), options=options, fixes=fixes, is_whole=True)

    return convert_both(planned, out, options, going)


def fixes_of(asked: RepairRequest, options: WriteOptions) -> Fixes:
    """What is fixed beside lost tensors."""
    from converter.recipe.verbs.repair_fixes import find_fixes

    fixes = find_fixes(
        asked.src,
        base=asked.base,
        target=asked.target,
        lora_alpha=asked.lora_alpha,
        allow=options.allow,
        weights=asked.weights,
        emit=asked.emit,
    )
    return fixes if asked.vocab is None else _with_vocabulary(fixes, asked.vocab)


def is_whole(recipe: Recipe, options: WriteOptions) -> bool:
    """True where nothing is lost, as far as headers tell."""
    from converter.converters.fill.refusals import NothingToRepair
    from converter.recipe.run import prepare

    try:
        prepare(recipe, allow=frozenset(options.allow), token=options.token, keep_code=options.keep_code)
    except NothingToRepair:
        return True
    except ConvertError:
        return False
    return False


def expect_sound(asked: RepairRequest, fixes: Fixes, only: frozenset[str] | None = None) -> None:
    """Say what neither fixes nor filling reach: an output with an error in it is not a repaired folder.

    Raises:
        Refused: there is an error, of the codes in `only` if given, that would be in the output; under its code.
    """
    from converter.recipe.verbs.repair_fixes import LORA_ALPHA

    left = [f for f in fixes.unfixed if only is None or f.code in only]
    if not left:
        return
    others = [f.code for f in left[1:]]
    more = f" (and {', '.join(others)})" if others else ""
    needed = dict(fixes.left).get(left[0].code)
    expected = needed if needed in (None, LORA_ALPHA) else f"--allow {needed}"
    raise Refused(left[0].code, left[0].text + more, where=show(asked.src), expected=expected, next=left[0].next)


def fix_recipe(asked: RepairRequest, fixes: Fixes, options: WriteOptions) -> Recipe:
    """The recipe of the fixes alone: every tensor is there."""
    from converter.recipe.verbs.repair_fixes import CHOOSE

    choosing = any(s.name == CHOOSE for s in fixes.steps)
    inputs = {SOURCE: InputSpec(asked.src, revision=options.revision, broken=choosing)}
    if asked.base is not None and any("base" in s.fields for s in fixes.steps):
        inputs["base"] = input_spec(asked.base)
    return Recipe(inputs, (*fixes.steps, *cast_steps(options)), output(options), file="repair")


def shards_alone(root: Path, asked: RepairRequest, found: Search) -> str | None:
    """The shards of a folder that has no weight file at all: then a repair is a gather."""
    from converter.sources.finding import source_kind
    from converter.sources.survey import file_names, is_weights_of_model

    if source_kind(root) == "training":
        return asked.src
    names = file_names(root)
    if ADAPTER_CONFIG in names or is_weights_of_model(names) or any(n.startswith(f"{ADAPTER_STEM}.") for n in names):
        return None  # an adapter's config is in the folder, and what belongs to it is filled
    return next((p.path for p in found.places if not p.is_copy), None)


def repair_recipe(
    asked: RepairRequest, found: Search, options: WriteOptions, *, fixes: tuple[Step, ...] = ()
) -> Recipe:
    """The recipe that the arguments mean: the broken folder, every place that may help, and the base if at hand."""
    from converter.recipe.verbs.repair_fixes import CHOOSE

    inputs = {SOURCE: InputSpec(asked.src, revision=options.revision, broken=True)}
    places = {f"weights-{n}": InputSpec(p.path, broken=p.is_copy) for n, p in enumerate(found.places, 1)}
    fields: dict[str, Any] = {"weights": list(places)} if places else {}
    base = _base(asked, inputs[SOURCE])
    if base is not None:
        fields["base"] = "base"
        places["base"] = base
    before = tuple(s for s in fixes if s.name == CHOOSE)
    steps = (*before, Step("fill", fields), *(s for s in fixes if s not in before), *cast_steps(options))
    return Recipe(inputs | places, steps, output(options), file="repair")


def _base(asked: RepairRequest, source: InputSpec) -> InputSpec | None:
    """The base model: given, or recorded and at hand; nothing is downloaded on a file's word."""
    if asked.base is not None:
        return input_spec(asked.base)
    from converter.sources.opening import open_checkpoint, open_recorded_base

    broken = open_checkpoint(source, token=None, keep_code=False)
    try:
        if broken.origin.kind == "adapter":
            open_recorded_base(broken, keep_code=False)
            return InputSpec(base_of=SOURCE)
        name = broken.config.get("_name_or_path")
        if not isinstance(name, str) or not name:
            return None
        spec = InputSpec(name)
        found = open_checkpoint(spec, token=None, keep_code=False, download=False)
    except ConvertError:
        return None
    return None if found.origin.path == broken.origin.path else spec
