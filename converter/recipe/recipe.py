"""A recipe: which inputs, which converters in which order, how the output is laid out. Every verb builds one.

Pydantic validates, here only. A recipe has no templating; paths in it are relative to the folder it is run in, as every
path that a user types.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from converter.core.writer.plan import Layout
from converter.diagnostic import Command, Next
from converter.errors import UsageError
from converter.shipped import shipped
from converter.sources.opening import InputSpec
from converter.text import nearest, parse_size, show

if TYPE_CHECKING:
    from pydantic import BaseModel, ValidationError

    from converter.core.files.strict_yaml import Path as Keys
    from converter.core.files.strict_yaml import RecipeText

VERSION = 1
MOST_ENTRIES = 200
"""Pairs or texts of a probe that are looked at unless more are asked for."""

SOURCE = "source"
"""Name of the input that flows through the steps."""

_INPUT_NAME = re.compile(r"[a-z][a-z0-9-]{0,40}", re.ASCII)

RENAMED = {
    f"mend-{each}": f"fix-{each}"
    for each in (
        "adapter-names", "architecture", "disk-names", "for-transformers-4", "labels", "names", "pad-token", "ties",
        "vocabulary",
    )
}  # fmt: skip
"""Steps by the names that release 0.1.0 had for them: recipe files of that release are run as they are."""


@dataclass(frozen=True)
class Step:
    """A converter's name and its fields, kebab-case, as plain values."""

    name: str
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Output:
    """How the result is laid out; `max_shard_size` in bytes.

    Attributes:
        link_unchanged: files that stay as they are become symbolic links to those of the source.
    """

    layout: Layout = "auto"
    max_shard_size: int | None = None
    link_unchanged: bool = False


@dataclass(frozen=True)
class Probe:
    """Texts on which a merge is compared with what was trained; it changes nothing of what is written.

    Attributes:
        file: preference pairs or texts.
        pairs: how many of them, the first ones.
        against_base: an input: another base that the adapter may have been trained over.
    """

    file: str
    pairs: int = MOST_ENTRIES
    against_base: str | None = None


@dataclass(frozen=True)
class Recipe:
    """Inputs, steps and output; `file` is what errors call it, `text` where it was read from a file."""

    inputs: Mapping[str, InputSpec]
    steps: tuple[Step, ...]
    output: Output = Output()
    file: str = "recipe"
    text: RecipeText | None = None
    probe: Probe | None = None

    def with_inputs(self, given: Mapping[str, InputSpec]) -> Recipe:
        """The recipe with the places that the user gave for its inputs.

        Raises:
            UsageError: a name that the recipe doesn't have (`unknown-input`).
        """
        for name in given:
            if name not in self.inputs:
                known = ", ".join(self.inputs)
                raise UsageError(
                    "unknown-input", f"the recipe has no input `{show(name)}`", where=self.file, expected=known
                )
        return dataclasses.replace(self, inputs={**self.inputs, **given})

    def steps_to_value(self) -> list[dict[str, Any]]:
        """The steps as they are written in YAML."""
        return [{s.name: dict(s.fields)} for s in self.steps]

    def output_to_value(self) -> dict[str, Any]:
        """The output as it is written in YAML, sizes in bytes."""
        size = {} if self.output.max_shard_size is None else {"max-shard-size": self.output.max_shard_size}
        links = {"link-unchanged": True} if self.output.link_unchanged else {}
        return {"layout": self.output.layout, **size, **links}

    def _probe_to_value(self, probe: Probe) -> dict[str, Any]:
        more = {} if probe.against_base is None else {"against-base": probe.against_base}
        return {"file": probe.file, "pairs": probe.pairs, **more}

    def to_yaml(self) -> str:
        """The recipe as a file that `rlhf-convert run` takes."""
        import yaml

        value = {
            "version": VERSION,
            "inputs": {name: spec.to_value() for name, spec in self.inputs.items()},
            "steps": self.steps_to_value(),
            "output": self.output_to_value(),
            **({} if self.probe is None else {"probe": self._probe_to_value(self.probe)}),
        }
        return yaml.safe_dump(value, sort_keys=False, default_flow_style=False, allow_unicode=True, width=1000)


def load_recipe(name: str) -> Recipe:
    """The recipe in a file, or the shipped one of that name.

    Raises:
        UsageError: no such recipe (`no-such-recipe`), or one that isn't valid (`recipe-syntax`, `recipe`).
    """
    path = Path(name)
    if "/" in name or path.suffix in (".yaml", ".yml") or path.exists():
        return parse_recipe(_read(path, name), file=show(name))
    known = shipped_recipes()
    if name not in known:
        near = nearest(name, known)
        raise UsageError(
            "no-such-recipe",
            f"neither a file nor a shipped recipe: {show(name)}",
            expected=", ".join(known),
            next=f"did you mean `{near[0]}`?" if near else Command("list"),
        )
    return parse_recipe(known[name].encode(), file=f"{name}.yaml")


def shipped_recipes() -> dict[str, str]:
    """Names of the recipes in the package, with their text."""
    return {f.stem: f.read_text("utf-8") for f in sorted(shipped("recipes").glob("*.yaml"))}


def _read(path: Path, asked: str) -> bytes:
    from converter.core.files.opening import read_limited
    from converter.core.files.strict_yaml import MAX_BYTES

    if not path.exists():
        raise UsageError("no-such-recipe", "there is no such recipe", where=show(asked), next=Command("list"))
    return read_limited(path, limit=MAX_BYTES)


def parse_recipe(text: bytes, *, file: str) -> Recipe:
    """The recipe that a YAML text says; unknown and duplicate keys are errors with file and line.

    Raises:
        UsageError: not YAML as recipes use it (`recipe-syntax`), or not a recipe (`recipe`).
    """
    from pydantic import ValidationError

    from converter.core.files.strict_yaml import read_values

    read = read_values(text, file=file)
    try:
        values = _recipe_model().model_validate_json(json.dumps(_spelled_out(read.value))).model_dump()
    except ValidationError as error:
        raise invalid(error, (), read, file) from None
    recipe = Recipe({}, tuple(_steps(values["steps"], read, file)), file=file, text=read)
    for name in values["inputs"]:
        if not _INPUT_NAME.fullmatch(name):
            raise wrong(
                recipe, ("inputs", name), f"not a name of an input: {show(name)}", expected="kebab-case, as my-adapter"
            )
    inputs = {name: _input_spec(recipe, name, value) for name, value in values["inputs"].items()}
    probe = None if values["probe"] is None else Probe(**values["probe"])
    return dataclasses.replace(recipe, inputs=inputs, output=_output(recipe, values["output"]), probe=probe)


def _spelled_out(value: Any) -> Any:
    """An input that is a path alone, or is left open, written as a mapping: errors then name keys and no unions."""
    if not isinstance(value, dict) or not isinstance(value.get("inputs"), dict):
        return value
    inputs = {n: {"path": v} if v is None or isinstance(v, str) else v for n, v in value["inputs"].items()}
    return {**value, "inputs": inputs}


@functools.cache
def _recipe_model() -> type[BaseModel]:
    from pydantic import BaseModel, ConfigDict, Field

    config = ConfigDict(extra="forbid", strict=True, populate_by_name=False)

    class InputModel(BaseModel):
        model_config = config
        path: str | None = None
        base_of: str | None = Field(None, alias="base-of")
        revision: str | None = None
        master: bool = False
        broken: bool = False

    class OutputModel(BaseModel):
        model_config = config
        layout: Layout = "auto"
        max_shard_size: str | int | None = Field(None, alias="max-shard-size")
        link_unchanged: bool = Field(default=False, alias="link-unchanged")

    class ProbeModel(BaseModel):
        model_config = config
        file: str
        pairs: int = Field(MOST_ENTRIES, ge=1)
        against_base: str | None = Field(None, alias="against-base")

    class RecipeModel(BaseModel):
        model_config = config
        version: Literal[1]
        inputs: dict[str, InputModel] = Field(min_length=1)
        steps: list[dict[str, dict[str, Any] | None]] = Field(default_factory=list)
        output: OutputModel = Field(default_factory=lambda: OutputModel.model_validate({}))
        probe: ProbeModel | None = None

    return RecipeModel


def _steps(values: Iterable[dict[str, Any]], read: RecipeText, file: str) -> Iterator[Step]:
    for index, value in enumerate(values):
        if len(value) != 1:
            line = read.line(("steps", index))
            got = ", ".join(show(k) for k in value) or "none"
            raise UsageError("recipe", "a step is one converter's name and its fields", where=f"{file}:{line}", got=got)
        ((name, fields),) = value.items()
        yield Step(RENAMED.get(name, name), fields or {})


def _input_spec(recipe: Recipe, name: str, value: Any) -> InputSpec:
    if value["path"] is not None and value["base_of"] is not None:
        raise wrong(recipe, ("inputs", name), "an input has a `path` or is `base-of` another, not both")
    return InputSpec(**value)


def _output(recipe: Recipe, value: Mapping[str, Any]) -> Output:
    size, links = value["max_shard_size"], value["link_unchanged"]
    if size is None:
        return Output(value["layout"], link_unchanged=links)
    try:
        return Output(value["layout"], parse_size(str(size), what="max-shard-size"), links)
    except UsageError as error:
        raise wrong(recipe, ("output", "max-shard-size"), error.what, expected=error.expected) from None


# Errors with file and line


def place(recipe: Recipe, keys: Keys) -> str:
    """File and line of a value."""
    return recipe.file if recipe.text is None else f"{recipe.file}:{recipe.text.line(keys)}"


def wrong(
    recipe: Recipe, keys: Keys, what: str, *, expected: str | None = None, next: Next | None = None
) -> UsageError:
    """The error for a value that is not what a recipe may say."""
    return UsageError("recipe", what, where=place(recipe, keys), expected=expected, next=next)


def invalid(
    error: ValidationError, keys: Keys, text: RecipeText | None, file: str, *, known: Iterable[str] = ()
) -> UsageError:
    """What pydantic found, as ours: an unknown key before all else, since it explains a missing one."""
    found = error.errors(include_url=False, include_context=False)
    first = min(found, key=lambda e: e["type"] != "extra_forbidden")
    # Pydantic adds the branch of a union to the path, which is not a key of the recipe.
    loc = tuple(p for p in first["loc"] if p not in ("str", "int", "dict[str,any]"))
    where = file if text is None else f"{file}:{text.line((*keys, *loc))}"
    key = show(loc[-1]) if loc else "the recipe"
    if first["type"] == "extra_forbidden":
        names = list(known) or ["version", "inputs", "steps", "output", "probe"]
        return UsageError("recipe", f"unknown key `{key}`", where=where, expected=", ".join(names) if known else None)
    if first["type"] == "missing":
        return UsageError("recipe", f"the key `{key}` is missing", where=where)
    return UsageError("recipe", f"`{key}`: {show(first['msg'])}", where=where, got=show(first["input"]))
