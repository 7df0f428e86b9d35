"""Pieces of the recipes that verbs build from their arguments."""

from __future__ import annotations

import os
from collections.abc import Mapping

from converter.core.tensors.dtypes import DType
from converter.core.writer.plan import Layout
from converter.errors import UsageError
from converter.recipe.options import LayoutChoice, WriteOptions
from converter.recipe.recipe import Output, Recipe, Step
from converter.text import parse_size


def cast_steps(options: WriteOptions) -> tuple[Step, ...]:
    """The step that `--dtype` asks for."""
    return () if options.dtype is None else (Step("cast", {"dtype": DType.parse(options.dtype).torch_name}),)


_LAYOUTS: Mapping[LayoutChoice, Layout] = {
    LayoutChoice.auto: "auto",
    LayoutChoice.preserve: "preserve",
    LayoutChoice.pack: "pack",
}


def output(options: WriteOptions, recipe: Recipe | None = None) -> Output:
    """The layout that the options ask for, else the recipe's.

    Raises:
        UsageError: a format of Megatron's, for something else (`usage`).
    """
    given = recipe.output if recipe else Output()
    size = given.max_shard_size
    if options.max_shard_size is not None:
        size = parse_size(options.max_shard_size, what="--max-shard-size")
    layout = given.layout if options.layout is None else _LAYOUTS.get(options.layout)
    if layout is None:
        raise UsageError("usage", f"--layout {options.layout} goes with --to megatron")
    return Output(layout, size, options.link_unchanged or given.link_unchanged)


def threads() -> int:
    """One a core that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
