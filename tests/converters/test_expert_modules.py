"""LoRA over single experts (transformers 4, unsloth, Megatron, Tinker): merged into bases of either form."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

import oracle
from oracle.bases import edit_config
from oracle.command import merged
from oracle.expected import inputs_for
from oracle.families import marked
from oracle.mixtures import EXPERTS, MIXTURES, MixtureBase, add_expert_modules, as_saved, make_mixture

CLOSE = 4e-6
SCALE = 5 / 3
APART = [name for name, mixture in MIXTURES.items() if mixture.one_by_one]
PEFT_READS = ["mixtral", "qwen3_moe", "deepseek_v3", "olmoe"]
"""Families whose adapters of transformers 4 PEFT converts when it loads them; of others it drops the keys silently."""
STACKED = pytest.mark.parametrize("stacked", [False, True], ids=["one by one", "stacked"])


def expert_modules(base: MixtureBase) -> list[str]:
    """Modules of single experts, by their names on disk."""
    found = [n.removesuffix(".weight") for n in oracle.read_tensors(base.path) if re.search(r"experts\.\d+\.", n)]
    assert len(found) == 2 * EXPERTS * 3
    return found


def of_transformers_4(tmp_path: Path, base: MixtureBase, modules: Iterable[str], dtype: Any = None) -> Path:
    """An adapter over attention and these modules, as transformers 4 named them: base on disk, experts one by one."""
    attention = oracle.make_adapter(tmp_path / "attention", base)
    adapter = add_expert_modules(base, attention, tmp_path / "adapter", list(modules), dtype=dtype)
    last = {m.rpartition(".")[2] for m in modules}
    edit_config(adapter, "adapter_config.json", target_modules=[*base.targets, *sorted(last)], lora_dropout=0.0)
    return adapter


def added(expected: dict[str, Any], base: MixtureBase, adapter: Path) -> dict[str, Any]:
    """PEFT's merge of attention, and every expert's update by arithmetic, rounded first as PEFT does for experts."""
    before = oracle.read_tensors(base.path)
    from safetensors.torch import load_file

    factors = load_file(adapter / "adapter_model.safetensors")
    for key, a in factors.items():
        if re.search(r"experts\.\d+\..*lora_A", key):
            name = key.removeprefix("base_model.model.").replace(".lora_A", "")
            update = torch.mm(factors[key.replace("lora_A", "lora_B")].float(), a.float()) * SCALE
            expected[name] = before[name] + update.to(before[name].dtype)
    return expected


@STACKED
@pytest.mark.parametrize("family", marked(PEFT_READS, {"mixtral"}))
def test_all_experts_are_merged_to_pefts_bits(family: str, stacked: bool, tmp_path: Path) -> None:
    apart = make_mixture(tmp_path / "base", family, dtype="bfloat16")
    adapter = of_transformers_4(tmp_path, apart, expert_modules(apart))
    expected = oracle.peft_merge(apart, adapter)
    before = oracle.read_tensors(apart.path)
    changed = {n for n, t in expected.items() if "experts." in n and not t.equal(before[n])}
    assert len(changed) == 2 * EXPERTS * 3, "PEFT itself did not merge everything"
    base = make_mixture(tmp_path / "stacked", family, dtype="bfloat16", stacked=True) if stacked else apart
    merged(adapter, tmp_path / "out", "--base", base.path, "--numerics", "peft")
    assert sorted(oracle.read_tensors(tmp_path / "out")) == sorted(oracle.read_tensors(base.path))
    oracle.same_bits(as_saved(tmp_path / "out", base, dtype="bfloat16", apart=True), expected)


@STACKED
@pytest.mark.parametrize("family", marked(APART, {"qwen2_moe"}))
def test_some_modules_of_some_experts_are_merged_alone(family: str, stacked: bool, tmp_path: Path) -> None:
    """PEFT refuses `up_proj` without `gate_proj`, and drops the keys of Qwen2-MoE and others without a word."""
    apart = make_mixture(tmp_path / "base", family, dtype="bfloat16")
    second = MIXTURES[family].one_by_one[1]
    chosen = [m for m in expert_modules(apart) if re.search(rf"experts\.(1\.{second}|3\.\w+)$", m)]
    assert len(chosen) == 2 * 4
    adapter = of_transformers_4(tmp_path, apart, chosen)
    expected = added(oracle.peft_merge(apart, tmp_path / "attention"), apart, adapter)
    base = make_mixture(tmp_path / "stacked", family, dtype="bfloat16", stacked=True) if stacked else apart
    merged(adapter, tmp_path / "out", "--base", base.path, "--numerics", "peft")
    oracle.same_bits(as_saved(tmp_path / "out", base, dtype="bfloat16", apart=True), expected)


@STACKED
@pytest.mark.slow
def test_dora_over_single_experts_is_merged_into_either_form(stacked: bool, tmp_path: Path) -> None:
    apart = make_mixture(tmp_path / "base", "qwen3_moe")
    modules = [m for m in expert_modules(apart) if m.endswith(".up_proj")]
    adapter = of_transformers_4(tmp_path, apart, modules)
    before = oracle.read_tensors(apart.path)
    expected = added(oracle.peft_merge(apart, tmp_path / "attention"), apart, adapter)

    def add(tensors: dict[str, Any]) -> None:
        for name in modules:
            magnitude = before[f"{name}.weight"].norm(dim=1) * 1.1
            tensors[f"base_model.model.{name}.lora_magnitude_vector"] = magnitude
            merged_weight = expected[f"{name}.weight"]
            expected[f"{name}.weight"] = merged_weight * (magnitude / merged_weight.norm(dim=1)).view(-1, 1)
        for key in [k for k in tensors if "self_attn" in k]:
            del tensors[key]

    dora = oracle.rewrite_adapter(adapter, tmp_path / "dora", change=add)
    edit_config(dora, "adapter_config.json", use_dora=True, target_modules=["up_proj"])
    base = make_mixture(tmp_path / "stacked", "qwen3_moe", stacked=True) if stacked else apart
    merged(dora, tmp_path / "out", "--base", base.path)
    found = as_saved(tmp_path / "out", base, dtype="float32", apart=True)
    for name in modules:
        assert (found[f"{name}.weight"] - expected[f"{name}.weight"]).abs().max() < 1e-6


def test_experts_that_unsloth_keeps_as_linears_are_over_the_turned_stacks_of_gpt_oss(tmp_path: Path) -> None:
    """`gate_up_projs.3` was a Linear `[2 * width, hidden]`; the stack holds its transpose."""
    base = make_mixture(tmp_path / "base", "gpt_oss", dtype="bfloat16")
    attention = oracle.make_adapter(tmp_path / "attention", base)
    before = oracle.read_tensors(base.path)
    expected = oracle.peft_merge(base, attention)
    generator = torch.Generator().manual_seed(4)

    def add(tensors: dict[str, Any]) -> None:
        for stack in ("gate_up_proj", "down_proj"):
            for expert in (0, 3):
                name = f"model.layers.1.mlp.experts.{stack}"
                inputs, outputs = before[name].shape[1:]
                a = torch.randn(3, inputs, generator=generator) * 0.1
                b = torch.randn(outputs, 3, generator=generator) * 0.1
                key = f"base_model.model.{name}s.{expert}"
                tensors |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
                expected[name][expert] += (torch.mm(b, a) * SCALE).T.to(torch.bfloat16)

    adapter = oracle.rewrite_adapter(attention, tmp_path / "adapter", change=add)
    merged(adapter, tmp_path / "out", "--base", base.path, "--numerics", "peft")
    oracle.same_bits(oracle.read_tensors(tmp_path / "out"), expected)
    oracle.load_output(tmp_path / "out", base.auto)


@STACKED
def test_factors_of_three_dimensions_are_those_of_each_expert(stacked: bool, tmp_path: Path) -> None:
    """Megatron's exports: `experts.down_proj.lora_A` `[experts, r, in]` under the parameter's own name."""
    base = make_mixture(tmp_path / "base", "qwen3_moe", stacked=stacked)
    wrapped = oracle.make_adapter(
        tmp_path / "wrapped", base, target_parameters=base.parameters, lora_dropout=0.0, target_modules=[]
    )
    expected = oracle.peft_merge(base, wrapped)

    def apart(tensors: dict[str, Any]) -> dict[str, Any]:
        found = {}
        for key, value in tensors.items():
            stack = "gate_up_proj" if ".base_layer." in key else "down_proj"
            name = key.replace(".base_layer", "").replace("experts.", f"experts.{stack}.")
            cut = value.reshape(EXPERTS, 3, -1) if "lora_A" in key else value.reshape(-1, 3, EXPERTS).permute(2, 0, 1)
            found[name] = cut.contiguous()
        return found

    adapter = oracle.rewrite_adapter(wrapped, tmp_path / "adapter", change=apart)
    edit_config(adapter, "adapter_config.json", target_parameters=None, target_modules=["gate_up_proj", "down_proj"])
    merged(adapter, tmp_path / "out", "--base", base.path, "--numerics", "peft")
    oracle.same_bits(as_saved(tmp_path / "out", base, dtype="float32"), expected)


@pytest.mark.slow
@STACKED
def test_tinkers_stacks_are_merged_into_either_form(stacked: bool, tmp_path: Path) -> None:
    """w1, w3 and w2 are gate, up and down; a factor that all experts share has one row."""
    base = make_mixture(tmp_path / "base", "qwen3_moe", stacked=stacked)
    apart = make_mixture(tmp_path / "apart", "qwen3_moe")
    attention = oracle.make_adapter(tmp_path / "attention", apart)
    before = oracle.read_tensors(apart.path)
    expected = oracle.peft_merge(apart, attention)
    generator = torch.Generator().manual_seed(4)

    def add(tensors: dict[str, Any]) -> None:
        for part, leaf in (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")):
            name = "model.layers.0.mlp.experts"
            height, width = before[f"{name}.0.{leaf}.weight"].shape
            a = torch.randn(1, 3, width, generator=generator) * 0.1
            b = torch.randn(EXPERTS, height, 3, generator=generator) * 0.1
            tensors[f"base_model.model.{name}.{part}.lora_A.weight"] = a
            tensors[f"base_model.model.{name}.{part}.lora_B.weight"] = b
            for expert in range(EXPERTS):
                expected[f"{name}.{expert}.{leaf}.weight"] += torch.mm(b[expert], a[0]) * SCALE

    adapter = oracle.rewrite_adapter(attention, tmp_path / "adapter", change=add)
    merged(adapter, tmp_path / "out", "--base", base.path, "--numerics", "peft")
    oracle.same_bits(as_saved(tmp_path / "out", base, dtype="float32", apart=True), expected)


@pytest.mark.slow
@pytest.mark.parametrize("family", PEFT_READS)
def test_output_says_what_the_unmerged_peft_model_says(family: str, tmp_path: Path) -> None:
    apart = make_mixture(tmp_path / "base", family)
    adapter = of_transformers_4(tmp_path, apart, expert_modules(apart))
    inputs = inputs_for(apart)
    forward = oracle.peft_logits(apart, adapter, inputs=inputs)
    assert oracle.effect(apart, forward, inputs=inputs) > 0.02
    for base in (apart, make_mixture(tmp_path / "stacked", family, stacked=True)):
        out = tmp_path / f"out-{base.path.name}"
        merged(adapter, out, "--base", base.path)
        found = oracle.logits(oracle.load_output(out, base.auto), inputs)
        assert oracle.relative_difference(found, forward) < CLOSE
