"""`rlhf-convert extract-lora`, `prune-lora` and `convert-lora`."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from converter.blanks import new_name
from converter.cli import lines as report
from converter.cli.options import Conversion as Flags
from converter.cli.run.folder import convert
from converter.diagnostic import Command, Next, as_argument
from converter.recipe.recipe import Recipe
from converter.recipe.verbs import adapters as verb
from converter.recipe.verbs.adapters import adapter_recipe, extract_recipe
from converter.recipe.verbs.conversion import Conversion
from converter.text import show


def extract_lora(base: str, tuned: str, out: str | None, rank: int | None, energy: float | None, options: Flags) -> int:
    """Write the adapter that a tuned model is of its base."""
    own = functools.partial(verb.extract_lora, base, tuned, out, rank=rank, energy=energy)

    def recipe() -> Recipe:
        return extract_recipe(base, tuned, rank, energy, options.plain)

    convert(own, out, options, recipe=recipe, input_lines=model_lines, next_commands=_merge_back)
    return 0


def prune_lora(adapter: str, out: str | None, rank: int, options: Flags) -> int:
    """Write an adapter at a lower rank."""
    own = functools.partial(verb.prune_lora, adapter, out, rank=rank)

    def recipe() -> Recipe:
        return adapter_recipe(adapter, "prune-lora", {"rank": rank}, options.plain)

    convert(own, out, options, recipe=recipe, input_lines=adapter_lines, next_commands=_use)
    return 0


def convert_lora(adapter: str, out: str | None, target: str, base: str | None, options: Flags) -> int:
    """Write an adapter in another program's form."""
    own = functools.partial(verb.convert_lora, adapter, out, for_=target, base=base)

    def recipe() -> Recipe:
        return adapter_recipe(adapter, "convert-lora", {"target": target}, options.plain, base)

    convert(own, out, options, recipe=recipe, input_lines=adapter_lines, next_commands=_use)
    return 0


def adapter_lines(planned: Conversion) -> list[str]:
    """The screen's line about the adapter."""
    adapter = planned.prepared.opened["source"]
    return [report.line("adapter", f"{show(adapter.origin.asked)}  {report.adapter_kind(adapter.config)}")]


def _use(done: Conversion) -> Sequence[Next]:
    out = as_argument(str(done.out))
    return [Command("inspect", (out,)), Command("merge-lora", (out, new_name(out, "merged")))]


def model_lines(planned: Conversion) -> list[str]:
    """The screen's lines about the models."""
    words = {"source": "tuned", "base": "base"}
    return [report.base_line(words[n], c, recorded=False) for n, c in planned.prepared.opened.items()]


def _merge_back(done: Conversion) -> Sequence[Next]:
    base, out = done.prepared.opened["base"].origin.asked, as_argument(str(done.out))
    return [Command("merge-lora", (out, new_name(out, "merged"), "--base", as_argument(base)))]
