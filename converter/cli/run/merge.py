"""`rlhf-convert merge-lora`."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from converter.cli import lines as report
from converter.cli.options import Conversion as Flags
from converter.cli.run.folder import convert
from converter.recipe.recipe import SOURCE
from converter.recipe.verbs.merge import MergeRequest, merge_lora, merge_recipe, refuse_swapped

if TYPE_CHECKING:
    from converter.recipe.recipe import Recipe
    from converter.recipe.verbs.conversion import Conversion


def merge(asked: MergeRequest, out: str | None, options: Flags) -> int:
    """Merge adapters into their base."""

    def recipe() -> Recipe:
        refuse_swapped(asked, out)
        return merge_recipe(asked, options.plain)

    def lines(planned: Conversion) -> list[str]:
        return input_lines(planned, asked.lora_alpha)

    verb = functools.partial(of_request(asked, out), told=options.sink.tell)
    convert(verb, out, options, recipe=recipe, input_lines=lines)
    return 0


def of_request(asked: MergeRequest, out: str | None) -> functools.partial[Conversion]:
    """The function with its own arguments."""
    return functools.partial(
        merge_lora, asked.adapter, out, base=asked.base, adapters=asked.more, weights=asked.weights,
        numerics=asked.numerics, base_is_residual=asked.base_is_residual, lora_alpha=asked.lora_alpha,
        combine=asked.combine, density=asked.density, svd_rank=asked.svd_rank, seed=asked.seed,
        dequantize=asked.dequantize, requantize=asked.requantize, probe=asked.probe, pairs=asked.pairs,
        against_base=asked.against_base,
    )  # fmt: skip


def input_lines(planned: Conversion, alpha: float | None = None) -> list[str]:
    """The screen's lines about adapters and base, with the alpha that the user gave."""
    from converter.converters.merge.adapter_values import with_alpha

    opened, recorded = planned.prepared.opened, planned.prepared.recorded
    adapters = [c for name, c in opened.items() if name != SOURCE]
    lines = [report.adapter_line(c) for c in with_alpha(adapters, alpha)]
    return [*lines, report.base_line("base", opened[SOURCE], recorded=SOURCE in recorded)]
