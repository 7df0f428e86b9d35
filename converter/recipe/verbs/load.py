"""What `converter.load` does: a live torch model is filled from any source, in memory, one tensor at a time.

The source goes through the same recipe as a conversion: gathered, merged, its head remapped, every tensor accounted
for. What a conversion would write goes into the model instead. Everything that can be refused from headers is refused
before the first parameter changes.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from converter.errors import UsageError
from converter.recipe.options import HeadOptions
from converter.recipe.verbs.allowing import allowing
from converter.recipe.verbs.load_places import Matched, match
from converter.recipe.verbs.pieces import threads

if TYPE_CHECKING:
    from converter.core.compute.filling import Module
    from converter.core.compute.measures import Measures
    from converter.core.context import Note
    from converter.core.writer.reporter import Reporter
    from converter.dialects.spec import Role
    from converter.recipe.recipe import Recipe
    from converter.recipe.run import Prepared
    from converter.recipe.verbs.convert import Found


@dataclass(frozen=True)
class Loaded:
    """What a live model was filled with.

    Attributes:
        prepared: the recipe, its inputs, what came out of it, and what would have been written.
        filled: names in the model of what now holds the source's values.
        missing: names in the model that the source has nothing for, kept as they were with consent.
        unexpected: tensors of the source that the model has no place for, left out with consent.
        rounded: names in the model whose dtype is narrower than the source's, rounded with consent.
        measures: what kernels measured, by the source's names.
        seconds: wall time.
    """

    prepared: Prepared
    filled: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    rounded: tuple[str, ...]
    measures: Mapping[str, Measures]
    seconds: float

    @property
    def recipe(self) -> Recipe:
        """What was done to the source."""
        return self.prepared.recipe

    @property
    def notes(self) -> tuple[Note, ...]:
        """What a user should know of this run."""
        return tuple(self.prepared.context.notes)


def load(
    source: str | Path,
    model: Module,
    *,
    to: str | None = None,
    role: Role | None = None,
    from_: str | None = None,
    base: str | Path | None = None,
    weights_from: Sequence[str | Path] = (),
    part: str | None = None,
    tag: str | None = None,
    lora_alpha: float | None = None,
    dtype: str | None = None,
    bias: str = "refuse",
    normaliser: str = "fold",
    label: int | None = None,
    label_weights: str | None = None,
    init_head: str | None = None,
    seed: int = 0,
    revision: str | None = None,
    token: str | None = None,
    allow: Sequence[str] = (),
    allow_name: Sequence[str] = (),
    jobs: int | None = None,
    reporter: Reporter | None = None,
) -> Loaded:
    """Fill a live model's parameters and persistent buffers from any source; no folder is written.

    The model keeps its dtypes and devices: values are widened without a word, and rounded with the consent
    `load-rounds` only. Peak memory is the model and one tensor.

    Args:
        source: a model, an adapter (merged into its base), a trainer's state (gathered), a run, or a name on the Hub.
        model: a torch module whose parameters are whole and in memory.
        to: the trainer whose model it is: the head is remapped to what that trainer calls it. None: as it is.
        role: what that trainer uses it as; None: `critic`.
        dtype: merge in it rather than in the base's dtype.
        jobs: threads; None: one a core.

    The others are the knobs of `converter.convert`.

    Raises:
        UsageError: not a module; a head's knob without `to`; see `converter.convert`.
        Refused: as a conversion; and the model lacks a place (`load-unexpected`), the source a tensor
            (`load-missing`), a shape or a type differs (`load-shape`, `load-dtype`), a value would be rounded
            (`load-rounds`), a tensor is not whole in memory (`load-not-whole`), families differ (`load-family`),
            names that the model ties have different values (`load-tied`), or transformers changes values on loading in
            a way that is not done here (`load-layout`).
        VerificationFailed: a value overflowed in the model's dtype (`new-nonfinite`); the model is partly filled.
    """
    from converter.core.compute.filling import live_tensors

    begun = time.monotonic()
    options = HeadOptions(
        revision=revision, token=token, dtype=dtype, allow=_listed(allow), jobs=jobs, source=from_,
        base=None if base is None else str(base), weights_from=tuple(map(str, weights_from)), part=part, tag=tag,
        lora_alpha=lora_alpha, bias=bias, normaliser=normaliser, label=label, label_weights=label_weights,
        init_head=init_head, seed=seed,
    )  # fmt: skip
    live = live_tensors(model)
    with allowing(allow_name):
        prepared = _prepared(str(source), to, role, options)
        matched = match(prepared, model, live)
        measures = _filled(prepared, matched, options.jobs or threads(), reporter)
    filled = tuple(dict.fromkeys(n for f in matched.fillings for n in f.live.names))
    missing, unexpected = tuple(matched.missing), tuple(matched.unexpected)
    seconds = time.monotonic() - begun
    return Loaded(prepared, filled, missing, unexpected, tuple(matched.rounded), measures, seconds)


def _listed(codes: Sequence[str]) -> tuple[str, ...]:
    return (codes,) if isinstance(codes, str) else tuple(codes)


def _prepared(source: str, to: str | None, role: Role | None, options: HeadOptions) -> Prepared:
    """The source as a conversion would write it."""
    from converter.dialects.known import target
    from converter.recipe.run import prepare
    from converter.recipe.verbs.convert import find, lost_and_found, remap_recipe
    from converter.recipe.verbs.run_state import with_recorded_base

    allow = frozenset(options.allow)
    if to is None:
        _expect_no_head_options(role, options)
    found = find(source, options)

    def attempt(recorded: bool) -> Prepared:
        state = dataclasses.replace(found, recorded=recorded)
        if to is None:
            recipe = _plain_recipe(source, state, options)
        else:
            aim = target(to, role or "critic")
            places, _ = lost_and_found(state, options)
            recipe = remap_recipe(state, to, role or "critic", aim, options, places, "load")
        return prepare(recipe, allow=allow, token=options.token)

    return with_recorded_base(attempt, given=found.kind != "training" or options.base is not None)


def _expect_no_head_options(role: Role | None, options: HeadOptions) -> None:
    """Knobs that say how a head is remapped.

    Raises:
        UsageError: one is given, and no trainer (`usage`).
    """
    given = {
        "role": role, "from_": options.source, "head": options.head, "weights_from": options.weights_from or None,
        "label": options.label,
        "label_weights": options.label_weights, "init_head": options.init_head,
        "bias": None if options.bias == "refuse" else options.bias,
        "normaliser": None if options.normaliser == "fold" else options.normaliser,
    }  # fmt: skip
    if named := [name for name, value in given.items() if value is not None]:
        what = f"{' and '.join(named)} says how a head is remapped, and `to` names no trainer"
        raise UsageError("usage", what, expected="to='openrlhf', or another trainer's name")


def _plain_recipe(source: str, found: Found, options: HeadOptions) -> Recipe:
    """The recipe of a source whose head stays as it is: nothing, a merge, or a gather."""
    from converter.recipe.recipe import SOURCE, Recipe
    from converter.recipe.verbs.gather import GatherRequest, gather_recipe
    from converter.recipe.verbs.merge import MergeRequest, merge_recipe
    from converter.recipe.verbs.pieces import cast_steps
    from converter.sources.opening import input_spec

    if found.kind == "adapter":
        return merge_recipe(MergeRequest(source, options.base), options)
    if found.kind == "model":
        return Recipe({SOURCE: input_spec(source, options.revision)}, cast_steps(options), file="load")
    request = GatherRequest(
        source, tag=options.tag, base=options.base, emit="merged", lora_alpha=options.lora_alpha, part=options.part,
        recorded=found.recorded,
    )  # fmt: skip
    return gather_recipe(request, options)[0]


def _filled(prepared: Prepared, matched: Matched, jobs: int, reporter: Reporter | None) -> dict[str, Measures]:
    """Fill, with the checks of inputs and of the result that a conversion makes."""
    from converter.core.compute.filling import fill
    from converter.core.files.reading import InputFiles
    from converter.core.writer.record_checks import compare_records
    from converter.core.writer.reporter import Silent
    from converter.core.writer.write import reading_through
    from converter.recipe.run import look_at_values

    told = reporter or Silent()
    plan = prepared.plan
    with InputFiles(plan.inputs) as files, reading_through(plan):
        compare_records(plan.checks, files, jobs)
        told.start(sum(f.value.info.nbytes for f in matched.fillings), 1)
        measures = fill(matched.fillings, files, jobs=jobs, told=told.advance)
        look_at_values(prepared, measures)
        told.checking("that inputs are unchanged")
        files.check_unchanged()
    return measures
