"""LoRA over stacks of experts (`target_parameters`): the merge is PEFT's, whichever way the base holds its experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import oracle
from oracle.command import merged
from oracle.expected import inputs_for
from oracle.families import marked
from oracle.mixtures import MIXTURES, MixtureBase, as_saved, make_mixture

CLOSE = 4e-6
STACKED = pytest.mark.parametrize("stacked", [False, True], ids=["one by one", "stacked"])
OFTEN = {"mixtral", "gpt_oss"}


def over_stacks(path: Path, base: MixtureBase, **settings: Any) -> Path:
    """An adapter over every stack, unless `target_parameters` says otherwise; PEFT takes no dropout there."""
    return oracle.make_adapter(
        path, base, **({"target_parameters": base.parameters, "lora_dropout": 0.0, "target_modules": []} | settings)
    )


def expect_pefts_bits(base: MixtureBase, adapter: Path, out: Path, *, dtype: str, task: str = "CAUSAL_LM") -> None:
    """The output loads without a key missing or too many, and is PEFT's merge in the names that the base has."""
    expected = oracle.peft_merge(base, adapter)
    before = oracle.read_tensors(base.path)
    merged(adapter, out, "--base", base.path, "--numerics", "peft")
    found = oracle.read_tensors(out)
    assert {n: (t.dtype, t.shape) for n, t in found.items()} == {n: (t.dtype, t.shape) for n, t in before.items()}
    changed = [n for n, t in found.items() if not t.equal(before[n])]
    assert changed
    oracle.same_bits(as_saved(out, base, dtype=dtype), expected)


@STACKED
@pytest.mark.parametrize("family", marked(MIXTURES, OFTEN))
def test_all_stacks_are_merged_to_pefts_bits(family: str, stacked: bool, tmp_path: Path) -> None:
    base = make_mixture(tmp_path / "base", family, dtype="bfloat16", stacked=stacked)
    adapter = over_stacks(tmp_path / "adapter", base)
    expect_pefts_bits(base, adapter, tmp_path / "out", dtype="bfloat16")


@STACKED
@pytest.mark.parametrize("parameter", [0, 1], ids=["first", "last"])
@pytest.mark.parametrize("family", marked(MIXTURES, set()))
def test_one_stack_of_a_layer_is_merged_alone(family: str, parameter: int, stacked: bool, tmp_path: Path) -> None:
    base = make_mixture(tmp_path / "base", family, stacked=stacked)
    adapter = over_stacks(tmp_path / "adapter", base, target_parameters=[base.parameters[parameter]])
    expect_pefts_bits(base, adapter, tmp_path / "out", dtype="float32")


@STACKED
@pytest.mark.parametrize("family", marked(MIXTURES, {"qwen3_moe"}))
def test_output_says_what_the_unmerged_peft_model_says(family: str, stacked: bool, tmp_path: Path) -> None:
    """Attention and experts are trained, ranks and alphas by pattern, with rank-stabilised scales."""
    base = make_mixture(tmp_path / "base", family, stacked=stacked)
    adapter = over_stacks(
        tmp_path / "adapter",
        base,
        target_modules=base.targets,
        use_rslora=True,
        rank_pattern={r"experts\.down_proj": 2, "layers.0.self_attn.o_proj": 4},
        alpha_pattern={r"layers.1.*experts.gate_up_proj": 11},
    )
    merged(adapter, tmp_path / "out", "--base", base.path)
    inputs = inputs_for(base)
    forward = oracle.peft_logits(base, adapter, inputs=inputs)
    assert oracle.effect(base, forward, inputs=inputs) > 0.02
    found = oracle.logits(oracle.load_output(tmp_path / "out", base.auto), inputs)
    assert oracle.relative_difference(found, forward) < CLOSE


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", marked(MIXTURES, {"deepseek_v3"}))
def test_patterns_and_attention_are_merged_to_pefts_bits(family: str, dtype: str, tmp_path: Path) -> None:
    base = make_mixture(tmp_path / "base", family, dtype=dtype)
    adapter = over_stacks(
        tmp_path / "adapter",
        base,
        target_modules=base.targets,
        use_rslora=True,
        rank_pattern={"gate_up_proj": 4},
        alpha_pattern={"down_proj": 7},
    )
    expect_pefts_bits(base, adapter, tmp_path / "out", dtype=dtype)


@pytest.mark.parametrize("family", marked(["qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss"], {"qwen3_moe", "mixtral"}))
def test_router_is_a_parameter_too(family: str, tmp_path: Path) -> None:
    """A parameter of two dimensions has plain factors, and PEFT rounds their product before it adds it."""
    base = make_mixture(tmp_path / "base", family, dtype="bfloat16")
    router = "mlp.router.weight" if family == "gpt_oss" else "mlp.gate.weight"
    adapter = over_stacks(tmp_path / "adapter", base, target_parameters=[router, "experts.down_proj"])
    expect_pefts_bits(base, adapter, tmp_path / "out", dtype="bfloat16")


@pytest.mark.slow
@STACKED
def test_adapter_file_in_16_bits_and_a_sharded_base(stacked: bool, tmp_path: Path) -> None:
    import torch

    base = make_mixture(tmp_path / "base", "qwen3_moe", dtype="bfloat16", stacked=stacked)
    adapter = over_stacks(tmp_path / "adapter", base, dtype=torch.bfloat16)
    expect_pefts_bits(base, adapter, tmp_path / "out", dtype="bfloat16")


def test_biases_of_experts_are_parameters_of_two_dimensions(tmp_path: Path) -> None:
    base = make_mixture(tmp_path / "base", "gpt_oss")
    targets = ["experts.gate_up_proj", "experts.gate_up_proj_bias", "experts.down_proj"]
    adapter = over_stacks(tmp_path / "adapter", base, target_parameters=targets)
    expect_pefts_bits(base, adapter, tmp_path / "out", dtype="float32")
