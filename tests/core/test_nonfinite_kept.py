"""What is not finite in a merge: kept where any input was so already, stopped where the merge made it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from converter.core.tensors import kernel_specs
from converter.core.tensors import nodes as tensors
from converter.errors import VerificationFailed
from small_models import load, numbers, open_model, plan_of, save_model, written


def merge(folder: Path, **changed: torch.Tensor) -> Path:
    """`w + b @ a` written to `out`, with some of the three given."""
    given = {"w": numbers(8, 6).bfloat16(), "a": numbers(2, 6, seed=1), "b": numbers(8, 2, seed=2)} | changed
    checkpoint = open_model(save_model(folder / "model", given))
    params: dict[str, kernel_specs.Param] = {
        "scales": (1.0,), "dora": (False,), "numerics": "best", "out": "BF16", "transposed": False,
    }  # fmt: skip
    merged = tensors.apply(kernel_specs.LORA_MERGE, [checkpoint.tensors[n] for n in "wab"], params)
    written(plan_of(checkpoint.replace(tensors={**checkpoint.tensors, "w": merged})), folder / "out")
    return folder / "out"


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("name", ["a", "b"])
def test_what_an_adapter_had_that_is_not_finite_is_kept_and_counted(name: str, value: float, tmp_path: Path) -> None:
    factor = {"a": numbers(2, 6, seed=1), "b": numbers(8, 2, seed=2)}[name]
    factor[1, 1] = value
    out = merge(tmp_path, **{name: factor})
    found = json.loads((out / "rlhf-convert.json").read_text())["tensors"]["w"]
    count = int((~torch.isfinite(load(out)["w"])).sum())
    assert count > 1
    assert (found["nonfinite_kept"], found["nonfinite_new"]) == (count, 0)


def test_what_overflows_in_the_merge_stops_it(tmp_path: Path) -> None:
    with pytest.raises(VerificationFailed) as caught:
        merge(tmp_path, a=torch.full((2, 6), 3e38), b=torch.full((8, 2), 3e38))
    assert (caught.value.code, caught.value.exit_code) == ("new-nonfinite", 4)
    assert not (tmp_path / "out").exists()
