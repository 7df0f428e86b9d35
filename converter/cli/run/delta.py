"""`rlhf-convert make-delta` and `apply-delta`."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from converter.blanks import new_name
from converter.cli import lines as report
from converter.cli.options import Conversion as Flags
from converter.cli.run.folder import convert
from converter.core.checkpoint import DELTA
from converter.diagnostic import Command, Next, as_argument
from converter.recipe.recipe import SOURCE, Recipe
from converter.recipe.verbs import delta as verb
from converter.recipe.verbs.conversion import Conversion
from converter.text import format_size, show


def make_delta(base: str, tuned: str, out: str | None, options: Flags) -> int:
    """Write the difference of two models."""
    own = functools.partial(verb.make_delta, base, tuned, out)

    def recipe() -> Recipe:
        return verb.make_recipe(base, tuned, options.plain)

    convert(own, out, options, recipe=recipe, input_lines=input_lines, next_commands=_add)
    return 0


def apply_delta(base: str, deltas: Sequence[str], weights: Sequence[float], out: str | None, options: Flags) -> int:
    """Write a model plus differences."""
    own = functools.partial(verb.apply_delta, base, deltas, out, weights=weights)

    def recipe() -> Recipe:
        return verb.apply_recipe(base, deltas, weights, options.plain)

    convert(own, out, options, recipe=recipe, input_lines=input_lines)
    return 0


def input_lines(planned: Conversion) -> list[str]:
    """The screen's lines about models and differences."""
    lines = []
    for name, opened in planned.prepared.opened.items():
        if opened.origin.kind == DELTA:
            lines.append(report.line("delta", f"{show(opened.origin.asked)}  {format_size(opened.total_bytes)}"))
        else:
            word = "tuned" if name == SOURCE and "base" in planned.prepared.opened else "base"
            lines.append(report.base_line(word, opened, recorded=False))
    return lines


def _add(done: Conversion) -> Sequence[Next]:
    base, out = done.prepared.opened["base"].origin.asked, as_argument(str(done.out))
    return [Command("apply-delta", (as_argument(base), out, new_name(out, "applied")))]
