"""`--requantize same`: adapted FP8 weights back in their own blocks by transformers' rule; heads over such bases."""

from __future__ import annotations

import json
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

import oracle
import quantised
from oracle.bases import edit_config, quiet, read_config, read_tensors, write_tensors
from oracle.command import listing, merged, run

SIZE = (32, 16)


def exact_merge(folder: quantised.Folder, adapter: Path, name: str) -> torch.Tensor:
    """W + (alpha / r) B A, rounded once to fp32, W being the dequantised weight in the model's dtype."""
    weight = read_tensors(folder.whole.path)[name].double()
    factors = load_file(adapter / "adapter_model.safetensors")
    a, b = (factors[f"base_model.model.{name.removesuffix('.weight')}.lora_{f}.weight"].double() for f in "AB")
    held = json.loads((adapter / "adapter_config.json").read_text())
    return (weight + (b @ a) * (held["lora_alpha"] / held["r"])).float()


def of_transformers(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales as transformers quantises a weight on the fly."""
    from transformers.integrations.finegrained_fp8 import Fp8Quantize

    config = types.SimpleNamespace(weight_block_size=list(SIZE), scale_fmt="float")
    found = Fp8Quantize(types.SimpleNamespace(quantization_config=config))._quantize_one("m.weight", weight)
    return found["m.weight"], found["m.weight_scale_inv"]


def test_adapted_fp8_weights_are_what_transformers_quantises_of_the_merge(tmp_path: Path) -> None:
    folder = quantised.make(tmp_path, "fp8-blocks", sharded=True)
    adapter = oracle.make_adapter(tmp_path / "adapter", folder.whole, target_modules=["q_proj", "down_proj"])
    merged(adapter, tmp_path / "out", "--base", folder.path, "--requantize", "same")
    before, after = read_tensors(folder.path), read_tensors(tmp_path / "out")
    assert after.keys() == before.keys() and read_config(tmp_path / "out") == read_config(folder.path)
    changed = {n for n in before if n.endswith(("q_proj.weight", "down_proj.weight"))}
    receipt = json.loads((tmp_path / "out" / "rlhf-convert.json").read_text())
    for name in changed:
        exact = exact_merge(folder, adapter, name)
        codes, scale = of_transformers(exact)
        assert torch.equal(after[name].float(), codes.float())
        assert torch.equal(after[f"{name}_scale_inv"], scale)
        spread = scale.repeat_interleave(SIZE[0], 0).repeat_interleave(SIZE[1], 1)
        error = float((codes.float() * spread - exact).norm() / exact.norm())
        found = receipt["tensors"][name]["requantised_relative_error"]
        assert found == pytest.approx(error, rel=1e-4) and 0.01 < found < 0.05
    same = before.keys() - changed - {f"{n}_scale_inv" for n in changed}
    assert all(torch.equal(before[n].view(torch.uint8), after[n].view(torch.uint8)) for n in same)


def test_a_ragged_block_has_a_scale_of_its_own_when_written_back(tmp_path: Path) -> None:
    """Llama's 96 rows and 163-row head are no whole number of 40-row blocks: transformers would leave them whole."""
    from converter.core.compute.evaluate import to_torch
    from converter.core.tensors import nodes
    from converter.core.tensors import quantised_specs as kernels
    from converter.core.tensors.dtypes import DType, TensorInfo

    weight = torch.randn(100, 50, generator=torch.Generator().manual_seed(4))
    weight[40:80, 24:48] = 0
    (tmp_path / "w").write_bytes(weight.numpy().tobytes())
    stored = nodes.stored(TensorInfo(DType.F32, (100, 50)), str(tmp_path / "w"), 0)
    params: dict[str, Any] = {"rows": 40, "columns": 24, "out": "F32"}
    scales = nodes.apply(kernels.QUANTISE_FP8_SCALES, [stored], params)
    codes = nodes.apply(kernels.QUANTISE_FP8_CODES, [stored], {**params, "first": 0, "count": 100})
    grid, found = to_torch(scales), to_torch(codes)
    assert grid.shape == (3, 3) and grid[1, 1] == 1
    for i, j in ((0, 0), (2, 2), (1, 0)):
        block = weight[40 * i : 40 * (i + 1), 24 * j : 24 * (j + 1)]
        factor = 448 / block.abs().max()
        assert grid[i, j] == 1 / factor
        held = found[40 * i : 40 * (i + 1), 24 * j : 24 * (j + 1)]
        assert torch.equal(held.float(), (block * factor).clamp(-448, 448).to(torch.float8_e4m3fn).float())
    for start, stop in ((0, 1), (39, 41), (41, 100), (60, 90)):
        assert torch.equal(to_torch(nodes.rows(codes, start, stop)).float(), found[start:stop].float())
    assert torch.equal(to_torch(nodes.rows(scales, 1, 3)), grid[1:])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_codes_are_the_nearest_under_the_scale_as_it_is_stored(dtype: str, tmp_path: Path) -> None:
    """A scale in 16 bits is off by up to 0.4 %: codes under the exact one are others, and further off when loaded."""
    from converter.core.compute.evaluate import to_torch
    from converter.core.tensors import nodes
    from converter.core.tensors import quantised_specs as kernels
    from converter.core.tensors.dtypes import DType, TensorInfo

    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(11)) / 40
    (tmp_path / "w").write_bytes(weight.numpy().tobytes())
    stored = nodes.stored(TensorInfo(DType.F32, (64, 96)), str(tmp_path / "w"), 0)
    params: dict[str, Any] = {"rows": 32, "columns": 32, "out": {"bfloat16": "BF16", "float16": "F16"}[dtype]}
    scales = to_torch(nodes.apply(kernels.QUANTISE_FP8_SCALES, [stored], params))
    codes = to_torch(nodes.apply(kernels.QUANTISE_FP8_CODES, [stored], {**params, "first": 0, "count": 64}))
    assert scales.dtype is getattr(torch, dtype)
    spread = scales.double().repeat_interleave(32, 0).repeat_interleave(32, 1)
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    every = every[every.isfinite()]
    off = (codes.double() * spread - weight.double()).abs()
    least = (weight.double().unsqueeze(-1) - every * spread.unsqueeze(-1)).abs().amin(-1)
    assert (off <= least * (1 + 1e-6) + 1e-12).all()


@pytest.mark.parametrize("kind", ["nf4", "gptq", "fp8-channel"])
def test_formats_that_are_not_written_back_are_refused(kind: str, tmp_path: Path) -> None:
    folder = quantised.make(tmp_path, kind)
    adapter = oracle.make_adapter(tmp_path / "adapter", folder.whole, target_modules=["q_proj"])
    before = listing(tmp_path)
    ran = run("merge-lora", adapter, tmp_path / "out", "--base", folder.path, "--requantize", "same")
    assert (ran.code, listing(tmp_path)) == (3, before) and "not written back" in ran.text


def test_dequantize_and_requantize_exclude_each_other(tmp_path: Path) -> None:
    folder = quantised.make(tmp_path, "fp8-blocks")
    adapter = oracle.make_adapter(tmp_path / "adapter", folder.whole, target_modules=["q_proj"])
    both = ("--dequantize", "--requantize", "same")
    ran = run("merge-lora", adapter, tmp_path / "out", "--base", folder.path, *both)
    assert ran.code == 2 and "give one of them" in ran.text


@pytest.mark.parametrize("kind", ["nf4", "fp8-blocks"])
def test_a_reward_head_is_converted_over_a_backbone_that_stays_quantised(kind: str, tmp_path: Path) -> None:
    folder = quantised.make(tmp_path, kind)
    tensors = read_tensors(folder.path) | {"score.weight": torch.randn(1, 64).to(torch.bfloat16)}
    del tensors["lm_head.weight"]
    write_tensors(folder.path, tensors)
    labels = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "pad_token_id": 0}
    edit_config(folder.path, architectures=["LlamaForSequenceClassification"], **labels)
    ran = run("rm-to-critic", folder.path, tmp_path / "critic", "--to", "openrlhf")
    assert ran.code == 0, ran.text
    after = read_tensors(tmp_path / "critic")
    assert after.keys() == tensors.keys()
    assert all(torch.equal(after[n].view(torch.uint8), tensors[n].view(torch.uint8)) for n in tensors)
    assert read_config(tmp_path / "critic")["quantization_config"] == read_config(folder.path)["quantization_config"]


def test_a_reward_adapter_over_a_quantised_backbone_is_a_whole_reward_model(tmp_path: Path) -> None:
    folder = quantised.make(tmp_path, "nf4")
    adapter = oracle.make_adapter(tmp_path / "adapter", folder.whole, task="SEQ_CLS")
    merged(adapter, tmp_path / "out", "--base", folder.path, "--dequantize", "--numerics", "peft")
    expected = oracle.peft_merge(folder.whole, adapter, task="SEQ_CLS")
    oracle.same_bits(read_tensors(tmp_path / "out"), expected)
    with quiet():
        _, told = transformers.AutoModelForSequenceClassification.from_pretrained(
            tmp_path / "out", output_loading_info=True
        )
    assert not told["missing_keys"] and not told["unexpected_keys"]


def test_an_update_that_is_lost_in_fp8_is_refused_and_what_is_left_of_others_is_said(tmp_path: Path) -> None:
    folder = quantised.make(tmp_path, "fp8-blocks")
    adapter = oracle.make_adapter(tmp_path / "adapter", folder.whole, target_modules=["q_proj"])

    def weaker(tensors: dict[str, Any]) -> dict[str, Any]:
        return {k: v * 1e-7 if "lora_B" in k else v for k, v in tensors.items()}

    lost = oracle.rewrite_adapter(adapter, tmp_path / "lost", change=weaker)
    before = listing(tmp_path)
    same = ("--base", folder.path, "--requantize", "same")
    ran = run("merge-lora", lost, tmp_path / "out", *same)
    assert (ran.code, listing(tmp_path)) == (3, before)
    assert "no-op" in ran.text
    assert "survives" in run("merge-lora", adapter, tmp_path / "out", *same).text
    receipt = json.loads((tmp_path / "out" / "rlhf-convert.json").read_text())
    name = "model.layers.0.self_attn.q_proj.weight"
    old, new = (read_tensors(f)[name] for f in (folder.path, tmp_path / "out"))
    assert receipt["tensors"][name]["codes_changed"] == int((old.view(torch.uint8) != new.view(torch.uint8)).sum())
    assert 0.5 < receipt["tensors"][name]["surviving_share"] < 1.5
