"""What `repair` does: the fixes of doctor's findings, and lost tensors from where they still exist."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converter.errors import ConvertError, Refused, UsageError
from converter.recipe.options import WriteOptions
from converter.recipe.recipe import SOURCE, Recipe, Step
from converter.recipe.verbs.pieces import cast_steps, output
from converter.sources.opening import InputSpec, input_spec
from converter.text import show

if TYPE_CHECKING:
    from converter.recipe.verbs.repair_mends import Mends
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


_NAMES_FIRST = ("choose-weights", "split-lora", "mend-names", "mend-disk-names", "mend-adapter-names", "mend-ties")


def _with_vocabulary(mends: Mends, to: str) -> Mends:
    """The mends with the step that `--vocab` asks for, in place of one that only changes the config.

    Raises:
        UsageError: neither `rows`, `tokenizer` nor a number (`usage`).
    """
    if to not in ("rows", "tokenizer") and not (to.isascii() and to.isdecimal()):
        raise UsageError(
            "usage", f"--vocab {show(to)} is no vocabulary", expected="rows, tokenizer or a number of rows"
        )
    wanted = Step("vocabulary", {"to": int(to) if to.isdecimal() else to})
    steps = [s for s in mends.steps if s.name != "mend-vocabulary"]
    at = max((n for n, s in enumerate(steps, 1) if s.name in _NAMES_FIRST), default=0)
    left = tuple(each for each in mends.left if each[0] != "vocabulary-rows")
    unmended = tuple(f for f in mends.unmended if f.code != "vocabulary-rows")
    return dataclasses.replace(
        mends,
        steps=(*steps[:at], wanted, *steps[at:]),
        codes=(*mends.codes, "vocabulary"),
        left=left,
        unmended=unmended,
    )


def mends_of(asked: RepairRequest, options: WriteOptions) -> Mends:
    """What is mended beside lost tensors."""
    from converter.recipe.verbs.repair_mends import find_mends

    mends = find_mends(
        asked.src,
        base=asked.base,
        target=asked.target,
        lora_alpha=asked.lora_alpha,
        allow=options.allow,
        weights=asked.weights,
        emit=asked.emit,
    )
    return mends if asked.vocab is None else _with_vocabulary(mends, asked.vocab)


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


def expect_sound(asked: RepairRequest, mends: Mends, only: frozenset[str] | None = None) -> None:
    """Say what neither mends nor filling reach: an output with an error in it is no repaired folder.

    Raises:
        Refused: there is an error, of the codes in `only` if given, that would be in the output; under its code.
    """
    from converter.recipe.verbs.repair_mends import LORA_ALPHA

    left = [f for f in mends.unmended if only is None or f.code in only]
    if not left:
        return
    others = [f.code for f in left[1:]]
    more = f" (and {', '.join(others)})" if others else ""
    needed = dict(mends.left).get(left[0].code)
    expected = needed if needed in (None, LORA_ALPHA) else f"--allow {needed}"
    raise Refused(left[0].code, left[0].text + more, where=show(asked.src), expected=expected, next=left[0].next)


def mend_recipe(asked: RepairRequest, mends: Mends, options: WriteOptions) -> Recipe:
    """The recipe of the mends alone: every tensor is there."""
    from converter.recipe.verbs.repair_mends import CHOOSE

    choosing = any(s.name == CHOOSE for s in mends.steps)
    inputs = {SOURCE: InputSpec(asked.src, revision=options.revision, broken=choosing)}
    if asked.base is not None and any("base" in s.fields for s in mends.steps):
        inputs["base"] = input_spec(asked.base)
    return Recipe(inputs, (*mends.steps, *cast_steps(options)), output(options), file="repair")


def shards_alone(root: Path, asked: RepairRequest, found: Search) -> str | None:
    """The shards of a folder that has no weight file at all: then a repair is a gather."""
    from converter.sources.finding import source_kind
    from converter.sources.survey import ADAPTER_CONFIG, file_names, is_weights_of_model

    if source_kind(root) == "training":
        return asked.src
    names = file_names(root)
    if ADAPTER_CONFIG in names or is_weights_of_model(names) or any(n.startswith("adapter_model.") for n in names):
        return None  # an adapter's config is in the folder, and what belongs to it is filled
    return next((p.path for p in found.places if not p.is_copy), None)


def repair_recipe(
    asked: RepairRequest, found: Search, options: WriteOptions, *, mends: tuple[Step, ...] = ()
) -> Recipe:
    """The recipe that the arguments mean: the broken folder, every place that may help, and the base if at hand."""
    from converter.recipe.verbs.repair_mends import CHOOSE

    inputs = {SOURCE: InputSpec(asked.src, revision=options.revision, broken=True)}
    places = {f"weights-{n}": InputSpec(p.path, broken=p.is_copy) for n, p in enumerate(found.places, 1)}
    fields: dict[str, Any] = {"weights": list(places)} if places else {}
    base = _base(asked, inputs[SOURCE])
    if base is not None:
        fields["base"] = "base"
        places["base"] = base
    before = tuple(s for s in mends if s.name == CHOOSE)
    steps = (*before, Step("fill", fields), *(s for s in mends if s not in before), *cast_steps(options))
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
