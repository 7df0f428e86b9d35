"""What computes on a device, driven on the CPU's: the same bits as without one, and words where no GPU is there."""

from __future__ import annotations

import dataclasses
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import converter
from converter.converters.cast import Cast
from converter.converters.merge.quantised.dequantise import Dequantise
from converter.core.compute.device import chosen, repeatable, suits
from converter.core.compute.evaluate import evaluator
from converter.core.context import Context
from converter.core.files.reading import InputFiles
from converter.core.writer.plan import Plan
from converter.errors import UsageError
from converter.recipe.options import Going, WriteOptions
from converter.recipe.verbs.conversion import write_plan
from oracle import adapters, bases, command
from small_models import numbers, open_model, plan_of, save_model, written
from vendors import SETTINGS, of_case, quantised_model

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")


def on_cpu_device(plan: Plan) -> Plan:
    """The plan, computed by what computes on a GPU, whose device is the CPU's."""
    return dataclasses.replace(plan, device="cpu")


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def expect_same(plan: Plan, folder: Path, *, jobs: int = 2) -> None:
    """Written with a device and without one, receipt included."""
    with InputFiles({}) as files:
        computed = [e for e in plan.entries if e.runs is None]
        assert computed
        assert all(evaluator(e.matrix, files, "cpu").device is not None for e in computed)
        assert all(evaluator(e.matrix, files, None).device is None for e in computed)
    written(plan, folder / "plain", jobs=jobs)
    written(on_cpu_device(plan), folder / "there", jobs=jobs)
    assert files_of(folder / "there") == files_of(folder / "plain")


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_merge_has_the_bits_that_it_has_without_a_device(family: str, dtype: str, tmp_path: Path) -> None:
    base = bases.make_base(tmp_path / "base", family, dtype=dtype)
    first = adapters.make_adapter(tmp_path / "first", base, **adapters.lora(base, bias="all"))
    dora = family != "gpt2"  # a norm over a column needs the whole matrix, in one chunk
    second = adapters.make_adapter(tmp_path / "second", base, **adapters.lora(base, use_dora=dora))
    made = converter.merge_lora(first, base=base.path, adapters=(second,), weights=(0.5, 1) if not dora else ())
    expect_same(made.plan, tmp_path)


def test_chunks_of_one_tensor_share_what_all_of_them_need(tmp_path: Path) -> None:
    base = bases.make_base(tmp_path / "base", "llama", hidden=512, intermediate=4096)
    adapter = adapters.make_adapter(tmp_path / "adapter", base, **adapters.lora(base))
    plan = converter.merge_lora(adapter, base=base.path).plan
    assert max(len(e.chunks()) for e in plan.entries if e.runs is None) > 1
    expect_same(plan, tmp_path, jobs=4)


@pytest.mark.parametrize("case", SETTINGS)
def test_dequantised_weights_have_the_bits_that_they_have_without_a_device(case: str, tmp_path: Path) -> None:
    parts, _, config = of_case(case)
    checkpoint = Dequantise()(quantised_model(tmp_path / "model", parts, config), Context())
    expect_same(plan_of(checkpoint), tmp_path)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_cast_has_the_bits_that_it_has_without_a_device(dtype: str, tmp_path: Path) -> None:
    given = {"a": numbers(900, 700), "b": numbers(70, 3).to(torch.bfloat16), "c": numbers(5).to(torch.float16)}
    expect_same(plan_of(Cast(dtype)(open_model(save_model(tmp_path / "model", given)), Context())), tmp_path)


def test_what_runs_on_the_cpu_alone_is_computed_there(tmp_path: Path) -> None:
    base = bases.make_base(tmp_path / "base", "llama")
    settings = adapters.lora(base, init_lora_weights="olora")
    adapter = adapters.make_adapter(tmp_path / "adapter", base, noise=0.1, **settings)
    plan = converter.merge_lora(adapter, base=base.path).plan
    computed = [e.tensor for e in plan.entries if e.runs is None]
    assert computed
    assert not any(map(suits, computed))
    written(plan, tmp_path / "plain")
    written(on_cpu_device(plan), tmp_path / "there")
    assert files_of(tmp_path / "there") == files_of(tmp_path / "plain")


def test_torch_is_left_as_it_was() -> None:
    before = (torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision(), dict(os.environ))
    with repeatable():
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.get_float32_matmul_precision() == "highest"
    after = (torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision(), dict(os.environ))
    assert after == before


@pytest.mark.parametrize("text", ["gpu", "cuda:", "cuda:x", "cuda:-1", "CPU", "", "mps", "cuda:0 "])
def test_a_device_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="no device is named"):
        chosen(text)


@pytest.fixture(scope="module")
def merge(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, bytes]]:
    """An adapter, its base, and what a merge makes without a word of a device."""
    folder = tmp_path_factory.mktemp("device")
    base = bases.make_base(folder / "base", "llama", dtype="bfloat16")
    adapter = adapters.make_adapter(folder / "adapter", base, **adapters.lora(base))
    converter.merge_lora(adapter, folder / "out", base=base.path)
    return adapter, base.path, files_of(folder / "out")


@NO_GPU
def test_without_a_gpu_a_merge_goes_on_on_the_cpu_and_one_line_says_so(
    merge: tuple[Path, Path, dict[str, bytes]], tmp_path: Path
) -> None:
    adapter, base, expected = merge
    for asked in ("cuda", "cuda:1"):
        done = command.run("merge-lora", adapter, tmp_path / asked, "--base", base, "--device", asked)
        assert done.code == 0, done.err
        said = [line for line in done.out.splitlines() if "CUDA" in line]
        assert said == [f"note     --device {asked}: no CUDA device answers here, so all is computed on the CPU"]
        found = files_of(tmp_path / asked)
        assert {n: c for n, c in found.items() if n != "rlhf-convert.json"} == {
            n: c for n, c in expected.items() if n != "rlhf-convert.json"
        }
        assert b'"device"' in found["rlhf-convert.json"]


@NO_GPU
def test_auto_without_a_gpu_is_the_cpu_without_a_word(
    merge: tuple[Path, Path, dict[str, bytes]], tmp_path: Path
) -> None:
    adapter, base, expected = merge
    for numerics in ("best", "peft"):
        out = tmp_path / numerics
        done = command.run("merge-lora", adapter, out, "--base", base, "--device", "auto", "--numerics", numerics)
        assert done.code == 0, done.err
        assert "CUDA" not in done.out
    assert files_of(tmp_path / "best") == expected


def test_bits_of_peft_are_promised_on_the_cpu_alone(merge: tuple[Path, Path, dict[str, bytes]], tmp_path: Path) -> None:
    adapter, base, _ = merge
    with pytest.raises(UsageError, match="known of the CPU alone"):
        converter.merge_lora(adapter, tmp_path / "out", base=base, numerics="peft", device="cuda")
    assert not (tmp_path / "out").exists()


def test_an_executor_and_the_state_of_a_run_take_no_device(tmp_path: Path) -> None:
    plan = plan_of(Cast("bf16")(open_model(save_model(tmp_path / "model", {"a": numbers(9, 9)})), Context()))
    with ThreadPoolExecutor(1) as pool, pytest.raises(UsageError, match="leave the device out"):
        write_plan(on_cpu_device(plan), tmp_path / "out", WriteOptions(), Going(executor=pool))
    with pytest.raises(UsageError, match="--device has no meaning"):
        converter.reshard_state(tmp_path / "model", tmp_path / "out", world_size=2, device="cuda")  # type: ignore[call-arg]


def test_a_plan_keeps_its_device_and_another_number_is_the_same_work(tmp_path: Path) -> None:
    plan = plan_of(Cast("bf16")(open_model(save_model(tmp_path / "model", {"a": numbers(9, 9)})), Context()))
    first, second = (dataclasses.replace(plan, device=name) for name in ("cuda:0", "cuda:1"))
    assert Plan.from_json(first.to_json()) == first
    assert "device" not in plan.to_json()
    assert first.fingerprint == second.fingerprint
