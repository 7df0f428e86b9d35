"""A torch file, a head in a file of its own and a folder for the weights are as safe as plain safetensors."""

from __future__ import annotations

import dataclasses
import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from converter.core.checkpoint import Checkpoint
from converter.core.writer.write import write
from durability import Quiet, copy_inputs, fast_folder, merge_plan, tree
from faulty_runs import Merge, fail_at_intervals, fresh, overwriting, replay, resumed


def moved(checkpoint: Checkpoint) -> Checkpoint:
    """The merged model as torch files in a folder, the head in a file of its own."""
    backbone = {n: t for n, t in checkpoint.tensors.items() if not n.startswith("score")}
    head = {n: t for n, t in checkpoint.tensors.items() if n.startswith("score")}
    assert head
    return checkpoint.replace(tensors=backbone, beside={"value_head.pt": head}, container="torch", subfolder="modeling")


@pytest.fixture(scope="module")
def merge() -> Iterator[Merge]:
    with fast_folder() as folder:
        base, adapter = copy_inputs(folder)
        layout: dict[str, Any] = {"change": moved, "layout": "pack"}
        plan = merge_plan(base, adapter, max_shard_size=60_000, **layout)
        other = merge_plan(base, adapter, **layout)
        inputs = {n: tree(folder / n) for n in ("base", "adapter")}
        write(plan, folder / "whole", reporter=Quiet())
        write(other, folder / "former", reporter=Quiet())
        write(plan, folder / "unchecked", reporter=Quiet(), verify=False)
        trees = [tree(folder / name) for name in ("whole", "unchecked", "former")]
        yield Merge(folder, plan, other, inputs, *trees)


def test_what_is_written_is_torch_files_in_a_folder_and_a_head_at_the_top(merge: Merge) -> None:
    files = sorted(n for n, content in merge.checked.items() if n.endswith((".bin", ".pt")))
    assert files == [
        *(f"modeling/pytorch_model-0000{i}-of-00004.bin" for i in (1, 2, 3, 4)), "value_head.pt",
    ]  # fmt: skip
    assert list(torch.load(merge.folder / "whole" / "value_head.pt", weights_only=True)) == ["score.weight"]  # noqa: TID251 - the oracle


@pytest.mark.parametrize("scene", [fresh, resumed, overwriting])
def test_after_a_power_cut_out_is_absent_or_whole_and_the_next_run_finishes(
    merge: Merge, place: Path, scene: Any
) -> None:
    replay(merge, place, scene, most=20)


def test_a_single_file_in_a_folder_is_durable_under_its_name_before_it_is_published(merge: Merge, place: Path) -> None:
    """No index is written after it, which would make the folder's names durable."""
    single = dataclasses.replace(merge, plan=merge.other, checked=merge.former)
    assert [n for n in single.checked if n.startswith("modeling/")] == ["modeling/pytorch_model.bin"]
    replay(single, place, fresh, most=20)


def test_whatever_call_fails_the_next_run_finishes(merge: Merge, place: Path) -> None:
    assert fail_at_intervals(merge, place, errno.EIO, step=7) > 100, "the watch saw nothing"
