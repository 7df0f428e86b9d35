"""Rounding to another type: torch's own bits, and every value that overflows is counted, wherever it stands."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from converter.core.compute.evaluate import Evaluator
from converter.core.files.reading import InputFiles
from converter.core.tensors.dtypes import DType
from converter.core.tensors.nodes import cast
from small_models import open_model, save_model

TYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


def rounded(values: torch.Tensor, folder: Path, dtype: str) -> tuple[torch.Tensor, dict[str, float]]:
    """The values as a file's tensor, cast."""
    if not folder.exists():
        save_model(folder, {"w": values})
    save_file({"w": values}, folder / "model.safetensors", metadata={"format": "pt"})
    measures: dict[str, float] = {}
    tensor = cast(open_model(folder).tensors["w"], DType(dtype))
    with InputFiles({}) as files:
        return Evaluator(files).evaluate(tensor, measures), measures


@pytest.mark.parametrize("to", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("given", [torch.bfloat16, torch.float16])
def test_every_value_of_16_bits_is_rounded_as_torch_rounds_it(tmp_path: Path, given: torch.dtype, to: str) -> None:
    every = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(given)
    out, measures = rounded(every, tmp_path / "m", to)
    expected = every.to(TYPES[to])
    assert torch.equal(out.view(torch.uint8), expected.view(torch.uint8))
    lost = int(torch.isfinite(every).sum()) - int(torch.isfinite(expected).sum())
    assert measures.get("nonfinite_new", 0) == lost


@pytest.mark.parametrize("to", ["F16", "BF16"])
@pytest.mark.parametrize("size", [1, 7, 64, 1000, 4097])
def test_one_value_that_overflows_is_counted_wherever_it_stands(tmp_path: Path, size: int, to: str) -> None:
    for at in {0, size // 3, size // 2, size - 1}:
        for huge in (3.4e38, -3.4e38):
            values = torch.linspace(-1, 1, size)
            values[at] = huge
            assert rounded(values, tmp_path / "m", to)[1] == {"nonfinite_new": 1.0}, (at, huge)


@pytest.mark.parametrize("kept", [float("nan"), float("inf"), -float("inf")])
def test_what_was_not_finite_before_is_not_counted_and_hides_nothing(tmp_path: Path, kept: float) -> None:
    values = torch.linspace(-1, 1, 301)
    values[150] = kept
    assert rounded(values, tmp_path / "m", "F16")[1].get("nonfinite_new", 0) == 0
    values[299] = 1e6
    assert rounded(values, tmp_path / "m", "F16")[1] == {"nonfinite_new": 1.0}
