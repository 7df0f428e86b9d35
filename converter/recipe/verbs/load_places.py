"""Which value goes where in a live model, and every refusal that can be made before its first parameter changes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from converter.core.tensors.byte_runs import byte_runs
from converter.core.tensors.dtypes import DType, TensorInfo, widens
from converter.core.tensors.nodes import Filled, LazyTensor
from converter.errors import Refused
from converter.families.live_names import Place, find_places
from converter.families.words import OLD_BUFFERS
from converter.text import fold, show

if TYPE_CHECKING:
    from converter.core.compute.filling import Filling, Live, Module
    from converter.core.writer.shard_plan import Entry
    from converter.recipe.run import Prepared

NORMALISERS = ("mean", "std")
"""Buffers that trainers fill from config.json when they build a model, and never save."""


@dataclass
class Matched:
    """Which values go where, and what has no counterpart: names of the model, but for `unexpected`."""

    fillings: list[Filling] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    rounded: list[str] = field(default_factory=list)


def match(prepared: Prepared, model: Module, live: Sequence[Live]) -> Matched:
    """What goes where.

    Raises:
        Refused: see `converter.load`.
    """
    config = _config_of(model)
    _expect_family(prepared, config)
    entries = {e.name: e for e in prepared.plan.entries}
    tied = dict(_tied(prepared.checkpoint.ties, entries))
    by_name = {n: each for each in live for n in each.names}
    places = find_places(
        [*entries, *tied],
        {n: each.shape for n, each in by_name.items()},
        classes=[c.__name__ for c in type(model).__mro__],
        prefix=getattr(model, "base_model_prefix", ""),
        config=config,
    )
    _expect_unchanged(prepared, places.changed)
    result = Matched(unexpected=[n for n in places.unexpected if n in entries])
    for name, place in _chosen(prepared, places.found, tied, entries, by_name).items():
        entry = entries[tied.get(name, name)]
        result.fillings.append(_filling(prepared, name, entry, place, by_name[place.name]))
    _expect_all(prepared, live, result)
    _expect_whole(prepared, result)
    _expect_types(prepared, result)
    result.fillings += _normalisers(model, prepared.checkpoint.config)
    return result


def _config_of(model: Module) -> dict[str, Any]:
    """The config of a model of transformers; empty for others."""
    to_dict = getattr(getattr(model, "config", None), "to_dict", None)
    found = to_dict() if to_dict is not None else {}
    return found if isinstance(found, dict) else {}


def _where(prepared: Prepared) -> str:
    return show(prepared.checkpoint.origin.asked)


def _expect_family(prepared: Prepared, config: Mapping[str, Any]) -> None:
    """Names and shapes may agree where the arithmetic does not."""
    here, there = (str(c.get("model_type") or "").removesuffix("_text") for c in (config, prepared.checkpoint.config))
    if here and there and here != there:
        prepared.context.consent(
            Refused(
                "load-family",
                f"the source is of the family {show(there)}, and the model of {show(here)}: nothing was loaded",
                where=_where(prepared),
                next="build the model from the source's config.json",
            )
        )


def _tied(ties: Sequence[Sequence[str]], entries: Mapping[str, Entry]) -> Iterator[tuple[str, str]]:
    """Names that are not stored, each with the stored one that it is tied to."""
    for group in ties:
        source = next((n for n in group if n in entries), None)
        if source is not None:
            yield from ((n, source) for n in group if n not in entries)


def _expect_unchanged(prepared: Prepared, names: Sequence[str]) -> None:
    if names:
        raise Refused(
            "load-layout",
            f"transformers computes {len(names)} tensors anew when it loads them, and this does not: {fold(names)}. "
            "Nothing was loaded",
            where=_where(prepared),
            next="convert to a folder, and load that with from_pretrained",
        )


def _chosen(
    prepared: Prepared,
    places: Mapping[str, Place],
    tied: Mapping[str, str],
    entries: Mapping[str, Entry],
    by_name: Mapping[str, Live],
) -> dict[str, Place]:
    """One source for each stretch of a live tensor; several must hold the same.

    Raises:
        Refused: they hold different values (`load-tied`).
    """
    chosen: dict[tuple[tuple[str, ...], int], str] = {}
    stored_first = sorted(places, key=lambda n: n in tied)
    for name in stored_first:
        place = places[name]
        key = (by_name[place.name].names, place.start)
        first = chosen.setdefault(key, name)
        if first == name or name in tied:
            continue
        if not _is_same(prepared, entries[tied.get(first, first)].tensor, entries[name].tensor):
            raise Refused(
                "load-tied",
                f"{show(first)} and {show(name)} are one tensor in the model, and differ in the source: nothing was "
                "loaded",
                where=_where(prepared),
                next="build the model untied: config.tie_word_embeddings = False",
            )
    return {name: places[name] for name in chosen.values()}


def _is_same(prepared: Prepared, a: LazyTensor, b: LazyTensor) -> bool:
    """True where both are computed alike, or stored with the same bytes."""
    if a == b:
        return True
    return byte_runs(a) is not None and byte_runs(b) is not None and prepared.context.equal(a, b)


def _filling(prepared: Prepared, name: str, entry: Entry, place: Place, live: Live) -> Filling:
    from converter.core.compute.filling import Filling

    if entry.tensor.shape != place.shape:
        raise Refused(
            "load-shape",
            f"{show(name)} has another shape than {show(place.name)} of the model: nothing was loaded",
            where=_where(prepared),
            expected=str(list(place.shape)),
            got=str(list(entry.tensor.shape)),
            next="build the model from the source's config.json",
        )
    return Filling(name, entry.matrix, live, place.start, entry.chunks())


def _expect_all(prepared: Prepared, live: Sequence[Live], found: Matched) -> None:
    """Nothing is left over on either side, unless the user consents."""
    count = {id(f.live): 0 for f in found.fillings}
    for filling in found.fillings:
        count[id(filling.live)] += filling.value.info.numel
    whole = {id(f.live) for f in found.fillings if count[id(f.live)] == _numel(f.live)}
    found.missing = [
        each.names[0] for each in live if id(each) not in whole and not each.names[0].endswith(OLD_BUFFERS)
    ]
    if found.unexpected:
        what = f"the model has no place for {len(found.unexpected)} tensors: {fold(found.unexpected)}"
        prepared.context.consent(_left_over("load-unexpected", what, prepared))
    if found.missing:
        what = f"the source has nothing for {len(found.missing)} of the model's tensors: {fold(found.missing)}"
        prepared.context.consent(_left_over("load-missing", what, prepared))


def _left_over(code: str, what: str, prepared: Prepared) -> Refused:
    advice = "load into the class that the source is of; `to` and `role` remap a head to what a trainer's class has"
    return Refused(code, f"{what}. Nothing was loaded", where=_where(prepared), next=advice)


def _numel(live: Live) -> int:
    return TensorInfo(DType.U8, live.shape).numel


def _expect_whole(prepared: Prepared, found: Matched) -> None:
    faulty = {f.live.names[0]: f.live.fault for f in found.fillings if f.live.fault}
    if faulty:
        name, fault = next(iter(faulty.items()))
        raise Refused(
            "load-not-whole",
            f"{len(faulty)} tensors of the model can't be filled: {show(name)} {fault}",
            where=_where(prepared),
            next="build the model whole on a CPU or a GPU, fill it, and shard it afterwards",
        )


def _expect_types(prepared: Prepared, found: Matched) -> None:
    """A live tensor's dtype holds the value exactly, or the user consents to the rounding."""
    rounded: dict[str, str] = {}
    for filling in found.fillings:
        here, there = filling.live.dtype, filling.value.dtype
        if here is not None and (here is there or widens(there, here)):
            continue
        if here is None or not (here.is_float and there.is_float):
            raise Refused(
                "load-dtype",
                f"{show(filling.name)} is {there.value}, and the model's is "
                f"{'of a type that no checkpoint has' if here is None else here.value}",
                where=_where(prepared),
            )
        rounded[filling.live.names[0]] = f"{there.value} to {here.value}"
    found.rounded = list(rounded)
    if rounded:
        how = next(iter(rounded.values()))
        prepared.context.consent(
            Refused(
                "load-rounds",
                f"{len(rounded)} tensors would be rounded to the model's dtype, the first from {how}: {fold(rounded)}",
                where=_where(prepared),
                next="build the model in the source's dtype, or consent to the rounding",
            )
        )


def _normalisers(model: Module, config: Mapping[str, Any]) -> Iterator[Filling]:
    """Mean and std of the source's config.json, where the model has buffers for them that are not saved."""
    from converter.core.compute.filling import Filling, live_buffers

    for key, live in live_buffers(model, NORMALISERS).items():
        number = config.get(key)
        if isinstance(number, int | float) and not isinstance(number, bool):
            value = Filled(TensorInfo(DType.F32, live.shape), float(number))
            yield Filling(key, value, live, 0, [(0, live.shape[0] if live.shape else 1)])
