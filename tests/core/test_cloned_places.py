"""Data that is copied keeps its place in its block, so that a file system can share it, wherever it lies in a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from small_models import header_of, numbers, open_model, plan_of, save_model, written


def place_of(file: Path, name: str) -> int:
    """Offset of a tensor's first byte in the file."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
    begin: int = header_of(file)[name]["data_offsets"][0]
    return 8 + length + begin


@pytest.mark.parametrize("before", [0, 1, 100, 1023, 5000])
def test_the_largest_tensor_keeps_its_place_in_its_block_whatever_lies_before_it(before: int, tmp_path: Path) -> None:
    small = {"a": numbers(before)} if before else {}
    model = save_model(tmp_path / "model", {**small, "b": numbers(90, 200), "z": numbers(3)})
    checkpoint = open_model(model).rename({"z": "a.name.that.makes.the.header.longer.than.it.was"})
    written(plan_of(checkpoint), tmp_path / "out")
    places = [place_of(tmp_path / folder / "model.safetensors", "b") for folder in ("model", "out")]
    assert places[0] % 4096 == places[1] % 4096
    assert places[0] != places[1]
