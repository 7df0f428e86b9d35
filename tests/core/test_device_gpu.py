"""A merge and dequantising on a CUDA device, beside the CPU's and the exact values.

pytest -m gpu tests/core, on a machine with a CUDA device and a torch that is built for it. Nobody has run these yet.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import converter
from converter.converters.cast import Cast
from converter.converters.merge.quantised.dequantise import Dequantise
from converter.core.context import Context
from durability import tree
from oracle import adapters, bases
from small_models import load, numbers, open_model, plan_of, same, save_model, written
from vendors import SETTINGS, of_case, quantised_model

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def device() -> str:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device is here")
    return "cuda:0"


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_merge_has_the_same_bytes_in_every_run_and_is_as_near_as_the_cpu_s(
    family: str, dtype: str, tmp_path: Path
) -> None:
    base = bases.make_base(tmp_path / "base", family, dtype=dtype, hidden=512, intermediate=4096)
    adapter = adapters.make_adapter(tmp_path / "adapter", base, **adapters.lora(base))
    for name, jobs in (("first", 1), ("second", 4)):
        converter.merge_lora(adapter, tmp_path / name, base=base.path, device="cuda", jobs=jobs)
    assert tree(tmp_path / "first") == tree(tmp_path / "second")
    receipt = json.loads((tmp_path / "first" / "rlhf-convert.json").read_text())
    assert receipt["device"] == torch.cuda.get_device_name(0)
    converter.merge_lora(adapter, tmp_path / "cpu", base=base.path)
    converter.merge_lora(adapter, tmp_path / "exact", base=base.path, dtype="float32")
    there, here, exact = (load(tmp_path / name) for name in ("first", "cpu", "exact"))
    for name, value in there.items():
        step = torch.finfo(value.dtype).eps * exact[name].abs() + 1e-6  # where fp32 sums cancel
        assert bool(((value.double() - exact[name].double()).abs() <= step).all()), name
        assert value.ne(here[name]).double().mean() < 0.01, name


@pytest.mark.parametrize("case", SETTINGS)
def test_dequantised_weights_have_the_cpu_s_bits(case: str, tmp_path: Path, device: str) -> None:
    parts, _, config = of_case(case)
    plan = plan_of(Dequantise()(quantised_model(tmp_path / "model", parts, config), Context()))
    written(plan, tmp_path / "cpu")
    written(replace(plan, device=device), tmp_path / "there")
    assert same(load(tmp_path / "there"), load(tmp_path / "cpu"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_cast_has_the_cpu_s_bits(dtype: str, tmp_path: Path, device: str) -> None:
    model = save_model(tmp_path / "model", {"a": numbers(900, 700), "b": numbers(70, 3).to(torch.bfloat16)})
    plan = plan_of(Cast(dtype)(open_model(model), Context()))
    written(plan, tmp_path / "cpu")
    written(replace(plan, device=device), tmp_path / "there")
    assert same(load(tmp_path / "there"), load(tmp_path / "cpu"))


def test_a_number_that_no_device_has_is_refused(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", {"a": numbers(9, 9)})
    with pytest.raises(converter.UsageError, match="there is no CUDA device 99"):
        converter.reshard(model, tmp_path / "out", dtype="bf16", device="cuda:99", allow=("tensors-missing",))
