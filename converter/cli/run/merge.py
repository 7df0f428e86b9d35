"""`rlhf-convert merge-lora`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from converter.cli.options import Conversion
from converter.cli.run.folder import convert
from converter.recipe.recipe import SOURCE
from converter.recipe.verbs.merge import MergeRequest, merge_recipe, refuse_swapped

if TYPE_CHECKING:
    from converter.recipe.run import Prepared


def merge(asked: MergeRequest, out: str | None, options: Conversion) -> int:
    """Merge adapters into their base."""
    refuse_swapped(asked, out)

    def lines(prepared: Prepared) -> list[str]:
        return input_lines(prepared, asked.lora_alpha)

    return convert(merge_recipe(asked, options.plain), out, options, input_lines=lines)


def input_lines(prepared: Prepared, alpha: float | None = None) -> list[str]:
    """The screen's lines about adapters and base, with the alpha that the user gave."""
    from converter.cli import lines as report
    from converter.converters.merge.adapter_values import with_alpha

    opened = [c for name, c in prepared.opened.items() if name != SOURCE]
    adapters = [report.adapter_line(c) for c in with_alpha(opened, alpha)]
    return [*adapters, report.base_line("base", prepared.opened[SOURCE], recorded=SOURCE in prepared.recorded)]
