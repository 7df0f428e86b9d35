"""Runs whose layers or tensors were split over ranks: each part of the model is a ZeRO run of its own.

A pipeline's stage, or a tensor-parallel rank's slices, have data-parallel ranks of their own, which alone become more
or fewer. Files of a pipeline's layers don't depend on them, nor do those of experts: as many sets of these stay, each
on as many of the ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from converter.core.checkpoint import SideFile
from converter.errors import UsageError
from converter.sources.deepspeed.experts import expert_files, expert_weights
from converter.sources.deepspeed.files import LAYER, slices_in
from converter.sources.deepspeed.layout import listed_shapes, partition_counts
from converter.sources.deepspeed.pipeline import numbered_layers
from converter.sources.deepspeed.slices import read_slices
from converter.sources.deepspeed.state import Shards
from converter.sources.deepspeed.whole import is_pipeline, is_sliced
from converter.sources.survey import file_names
from converter.text import fold


def parts_of(first: Shards) -> list[Shards]:
    """Each part of a split model, of which the first is read; itself alone where it wasn't split.

    Raises:
        Refused: files are missing, or of several runs (`zero-pipeline`, `zero-tensor-parallel`, `zero-mixed`).
    """
    if is_pipeline(first.folder):
        return read_slices(first, "zero-pipeline", "stages of a pipeline")
    return read_slices(first) if is_sliced(first) else [first]


def data_ranks(first: Shards, world_size: int) -> int:
    """How many ranks each part gets of `world_size`.

    Raises:
        UsageError: the parts can't have equally many (`usage`).
    """
    parts = max(len(slices_in(first.folder)), 1)
    if world_size % parts:
        what = "stages of a pipeline" if is_pipeline(first.folder) else "tensor-parallel ranks"
        text = f"{world_size} ranks can't be dealt out to {parts} {what}, which stay as many as they were"
        raise UsageError("usage", text, expected=f"a multiple of {parts}")
    return world_size // parts


def expect_whole_sets(first: Shards, ranks: int) -> None:
    """Experts stay in as many sets as they were, each on as many of the ranks.

    Raises:
        UsageError: that can't be (`usage`).
    """
    counts = partition_counts(first, len(listed_shapes(first))) if first.experts else []
    sets = math.lcm(*(first.ranks // n for n in counts))
    if ranks % sets:
        text = f"{ranks} ranks can't be dealt out to {sets} sets of experts, which stay as many as they were"
        raise UsageError("usage", text, expected=f"a multiple of {sets}")


def split_words(first: Shards, parts: Sequence[Shards]) -> str:
    """`, 2 stages of a pipeline`: what a run's layout has beside its data-parallel ranks."""
    if len(parts) == 1:
        return ""
    return f", {len(parts)} {'stages of a pipeline' if is_pipeline(first.folder) else 'tensor-parallel ranks'}"


def kept_files(first: Shards, parts: Sequence[Shards]) -> dict[str, SideFile]:
    """The files of experts and of a pipeline's layers, which don't depend on the data-parallel ranks.

    Raises:
        Refused: an expert's or a layer's file is missing, or a pipeline has tensor-parallel ranks (`zero-experts`,
            `zero-pipeline`).
    """
    if not first.experts:
        return _layer_files(first, parts)
    expert_weights(first)
    names = expert_files(first).values()
    return {n: SideFile(source=str((first.folder / n).absolute())) for n in names}


def _layer_files(first: Shards, parts: Sequence[Shards]) -> dict[str, SideFile]:
    found: dict[str, SideFile] = {}
    held: dict[int, set[str | None]] = {}
    for name in sorted(file_names(first.folder)):
        if match := LAYER.fullmatch(name):
            first.open(name)
            held.setdefault(int(match[1]), set()).add(match[2])
            found[name] = SideFile(source=str((first.folder / name).absolute()))
    if not held:
        return {}
    slices = set().union(*held.values())
    needed = numbered_layers(n for part in parts for group in listed_shapes(part) for n in group)
    lost = sorted(n for n in needed | held.keys() if held.get(n) != slices)
    if lost:
        raise first.refuse(
            "zero-pipeline",
            f"the files of layers {fold([str(n) for n in lost])} are missing, or of some tensor-parallel ranks alone",
            next="copy them from the nodes that wrote them",
        )
    if len(slices) > 1:
        what = (
            f"its layers lie in the files of {len(slices)} tensor-parallel ranks, and a pipeline of these is not read"
        )
        raise first.refuse("zero-pipeline", what)
    return found
