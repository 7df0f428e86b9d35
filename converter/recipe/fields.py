"""A converter's fields as a recipe writes them: checked against the converter's annotations, inputs by name."""

from __future__ import annotations

import dataclasses
import functools
import json
import operator
import types
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from converter.converters.finding import Converter, find_converter
from converter.converters.merge.merge_lora import MergeLora
from converter.core.checkpoint import INPUT, Checkpoint
from converter.diagnostic import Again
from converter.errors import ConvertError, UsageError
from converter.recipe.recipe import SOURCE, Recipe, invalid, place, wrong
from converter.text import show

if TYPE_CHECKING:
    from pydantic import BaseModel


def check(recipe: Recipe) -> None:
    """All that can be known of a recipe before its inputs are opened.

    Raises:
        UsageError: an unknown converter; an unknown, missing or ill-typed field; an input that isn't declared, has no
            path or is used by no step (`unknown-converter`, `recipe`).
    """
    if SOURCE not in recipe.inputs:
        raise wrong(recipe, ("inputs",), f"an input must be named `{SOURCE}`: it flows through the steps")
    used = {SOURCE} | {spec.base_of for spec in recipe.inputs.values() if spec.base_of}
    for index in range(len(recipe.steps)):
        used |= set(_input_names(recipe, index))
    if recipe.probe is not None:
        used |= _names_of_probe(recipe)
    for name, spec in recipe.inputs.items():
        keys = ("inputs", name)
        if spec.base_of is not None and (spec.base_of not in recipe.inputs or spec.base_of == name):
            raise wrong(recipe, keys, f"`base-of` names no other input: {show(spec.base_of)}")
        if spec.base_of is None and spec.path is None:
            raise wrong(recipe, keys, f"the input `{name}` has no path", next=Again(("--input", f"{name}=PATH")))
        if name not in used:
            raise wrong(recipe, keys, f"no step uses the input `{name}`")


def _names_of_probe(recipe: Recipe) -> set[str]:
    """The input that a probe compares with, where it names one.

    Raises:
        UsageError: no step merges, or no input has the name (`recipe`).
    """
    assert recipe.probe is not None
    if all(step.name != MergeLora.name for step in recipe.steps):
        raise wrong(recipe, ("probe",), "a probe measures a merge, and no step is `merge-lora`")
    name = recipe.probe.against_base
    if name is None:
        return set()
    if name not in recipe.inputs or name == SOURCE:
        known = ", ".join(n for n in recipe.inputs if n != SOURCE)
        raise wrong(recipe, ("probe", "against-base"), f"no other input is named `{show(name)}`", expected=known)
    return {name}


def config_will_do(recipe: Recipe) -> frozenset[str]:
    """Inputs of which no step needs the weights for certain: a folder with the config alone is opened too."""
    used: dict[str, bool] = {}
    for index in range(len(recipe.steps)):
        enough: frozenset[str] = getattr(_converter(recipe, index), "config_will_do", frozenset())
        for field, name in _inputs_of(recipe, index):
            used[name] = used.get(name, True) and field in enough
    return frozenset(name for name, is_enough in used.items() if is_enough)


def instantiate(recipe: Recipe, checkpoints: Mapping[str, Checkpoint]) -> list[Converter]:
    """The converters of a checked recipe, their inputs filled in with opened checkpoints."""
    return [_instantiate(recipe, index, checkpoints) for index in range(len(recipe.steps))]


def _instantiate(recipe: Recipe, index: int, checkpoints: Mapping[str, Checkpoint]) -> Converter:
    kind = _converter(recipe, index)
    values = _validated(recipe, index, kind)
    hints = get_type_hints(kind, include_extras=True)
    try:
        return kind(**{name: _filled(value, hints[name], checkpoints) for name, value in values.items()})
    except UsageError as error:
        # What a converter finds wrong with its own fields when it is built.
        error.where = error.where or place(recipe, ("steps", index))
        raise


def _converter(recipe: Recipe, index: int) -> type[Converter]:
    try:
        return find_converter(recipe.steps[index].name)
    except ConvertError as error:
        error.where = error.where or place(recipe, ("steps", index, recipe.steps[index].name))
        raise


def _validated(recipe: Recipe, index: int, kind: type[Converter]) -> dict[str, Any]:
    """The step's fields by Python name, defaults left out; inputs are still names."""
    from pydantic import ValidationError

    step = recipe.steps[index]
    keys = ("steps", index, step.name)
    try:
        model = _fields_model(kind).model_validate_json(json.dumps(dict(step.fields)))
    except ValidationError as error:
        raise invalid(error, keys, recipe.text, recipe.file, known=_keys_of(kind)) from None
    return {name: getattr(model, name) for name in model.model_fields_set}


@functools.cache
def _fields_model(kind: type[Converter]) -> type[BaseModel]:
    """A model of the converter's fields as a recipe writes them: kebab-case, inputs by name."""
    from pydantic import ConfigDict, Field, create_model

    hints = get_type_hints(kind, include_extras=True)
    fields: dict[str, Any] = {}
    for each in dataclasses.fields(kind):  # type: ignore[arg-type]
        if not each.init:
            continue
        required = each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING
        fields[each.name] = (_as_written(hints[each.name]), Field(... if required else None, alias=_kebab(each.name)))
    config = ConfigDict(extra="forbid", strict=True, arbitrary_types_allowed=True, protected_namespaces=())
    return create_model(kind.__name__, __config__=config, **fields)


def _as_written(hint: Any) -> Any:
    """The type of a field in a recipe: an `Input` is the name of one."""
    if _is_input(hint):
        return str
    arguments = get_args(hint)
    if not arguments or get_origin(hint) in (Literal, Annotated):
        return hint
    written = tuple(a if a is Ellipsis else _as_written(a) for a in arguments)
    if get_origin(hint) in (Union, types.UnionType):
        return functools.reduce(operator.or_, written)
    return get_origin(hint)[written]


def _is_input(hint: Any) -> bool:
    return get_origin(hint) is Annotated and INPUT in hint.__metadata__


def _filled(value: Any, hint: Any, checkpoints: Mapping[str, Checkpoint]) -> Any:
    """The value with each name of an input replaced by its checkpoint."""
    if _is_input(hint):
        return checkpoints[value]
    if get_origin(hint) is tuple and isinstance(value, tuple):
        inner = get_args(hint)
        each = [inner[0]] * len(value) if len(inner) == 2 and inner[1] is Ellipsis else list(inner)
        return tuple(_filled(v, h, checkpoints) for v, h in zip(value, each, strict=True))
    if get_origin(hint) in (Union, types.UnionType) and isinstance(value, str):
        return checkpoints[value] if any(_is_input(h) for h in get_args(hint)) else value
    return value


def _input_names(recipe: Recipe, index: int) -> Iterator[str]:
    """Names of the inputs that a step uses, each of them declared."""
    return (name for _, name in _inputs_of(recipe, index))


def _inputs_of(recipe: Recipe, index: int) -> Iterator[tuple[str, str]]:
    """The fields of a step that name inputs, each with the name of one, which is declared."""
    kind = _converter(recipe, index)
    hints = get_type_hints(kind, include_extras=True)
    step = recipe.steps[index]
    for name, value in _validated(recipe, index, kind).items():
        for used in _names_in(value, hints[name]):
            keys = ("steps", index, step.name, _kebab(name))
            if used not in recipe.inputs:
                raise wrong(recipe, keys, f"no input is named `{show(used)}`", expected=", ".join(recipe.inputs))
            if used == SOURCE:
                raise wrong(recipe, keys, f"`{SOURCE}` flows through the steps and can't be an input of one as well")
            yield name, used


def _names_in(value: Any, hint: Any) -> Iterator[str]:
    wanted: list[str] = []

    class _Collect(dict[str, Any]):
        def __missing__(self, key: str) -> None:
            wanted.append(key)

    _filled(value, hint, _Collect())
    return iter(wanted)


def _keys_of(kind: type[Converter]) -> list[str]:
    return [_kebab(f.name) for f in dataclasses.fields(kind) if f.init]  # type: ignore[arg-type]


def _kebab(name: str) -> str:
    return name.replace("_", "-")
