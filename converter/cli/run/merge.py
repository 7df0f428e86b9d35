"""`rlhf-convert merge-lora`."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converter.cli.options import Conversion
from converter.cli.run.folder import convert
from converter.errors import ConvertError, UsageError
from converter.recipe.recipe import SOURCE, Recipe, Step
from converter.recipe.verbs.pieces import cast_steps, output
from converter.recipe.verbs.run_state import base_in
from converter.sources.hub.names import is_on_hub
from converter.sources.locate import resolve
from converter.sources.opening import InputSpec, input_spec

if TYPE_CHECKING:
    from converter.recipe.run import Prepared


RECEIPT = "rlhf-convert.json"


@dataclass(frozen=True)
class Merge:
    """What the user asked for."""

    adapter: str
    base: str | None = None
    more: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    numerics: str = "best"
    base_is_residual: bool = False


def merge(asked: Merge, out: str | None, options: Conversion) -> int:
    """Merge adapters into their base."""
    refuse_swapped(asked, out)
    try:
        return convert(merge_recipe(asked, options), out, options, head=head)
    except ConvertError as error:
        if error.code in ("base-unknown", "base-not-found"):
            error.next = _command(asked.adapter, out, base_in(error))
        raise


def merge_recipe(asked: Merge, options: Conversion) -> Recipe:
    """The recipe that the arguments mean.

    Raises:
        UsageError: not one weight for each adapter (`usage`).
    """
    adapters = {"adapter": input_spec(asked.adapter, options.revision)}
    adapters |= {f"adapter-{n}": input_spec(path) for n, path in enumerate(asked.more, 2)}
    if asked.weights and len(asked.weights) != len(adapters):
        raise UsageError(
            "usage",
            "give one --weight for each adapter, in order",
            expected=str(len(adapters)),
            got=str(len(asked.weights)),
        )
    fields: dict[str, Any] = {"adapters": list(adapters), "numerics": asked.numerics}
    if asked.weights:
        fields["weights"] = list(asked.weights)
    if asked.base_is_residual:
        fields["base-is-residual"] = True
    base = InputSpec(base_of="adapter") if asked.base is None else input_spec(asked.base)
    steps = (Step("merge-lora", fields), *cast_steps(options))
    return Recipe({SOURCE: base, **adapters}, steps, output(options), file="merge-lora")


def head(prepared: Prepared) -> list[str]:
    """The screen's lines about adapters and base."""
    from converter.cli import lines as report

    adapters = [report.adapter_line(c) for name, c in prepared.opened.items() if name != SOURCE]
    return [*adapters, report.base_line("base", prepared.opened[SOURCE], recorded=SOURCE in prepared.recorded)]


def refuse_swapped(asked: Merge, out: str | None) -> None:
    """Recognise a base model given as the adapter, or an adapter given as the base, by what the folders hold.

    Raises:
        UsageError: with the corrected command (`arguments-swapped`).
    """
    first = _kind(asked.adapter)
    given_base = None if asked.base is None else _kind(asked.base)
    if first == "model":
        what = f"{asked.adapter} is a model, not an adapter"
        if given_base == "adapter" and asked.base is not None:
            raise _swapped(what, _command(asked.base, out, asked.adapter))
        if out is not None and _kind(out) == "adapter":
            raise _swapped(f"{what}; {out} is the adapter", _command(out, None, asked.adapter))
        raise _swapped(what, _command("ADAPTER", out, asked.adapter))
    is_foreign_model = out is not None and _kind(out) == "model" and not (Path(out).expanduser() / RECEIPT).is_file()
    if first == "adapter" and asked.base is None and out is not None and is_foreign_model:
        raise _swapped(f"{out} is a model that is there already, not an output", _command(asked.adapter, None, out))
    if given_base == "adapter":
        raise _swapped(f"{asked.base} is an adapter, not a base model", _command(asked.adapter, out, "BASE"))


def _kind(text: str) -> str | None:
    folder = Path(text).expanduser()
    if is_on_hub(text):
        try:
            folder = resolve(text, in_parts=True).path
        except ConvertError:
            return None  # whoever opens it says why
    if (folder / "adapter_config.json").is_file():
        return "adapter"
    return "model" if (folder / "config.json").is_file() else None


def _swapped(what: str, command: str) -> UsageError:
    return UsageError("arguments-swapped", what, expected="merge-lora ADAPTER OUT --base BASE", next=command)


def _command(adapter: str, out: str | None, base: str) -> str:
    words = ["rlhf-convert", "merge-lora", adapter, out or "OUT", "--base", base]
    return shlex.join(words)
