"""How stacked factors are laid out: by PEFT of each version, by unsloth; what shapes do not say is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import oracle
from oracle.adapters import CONFIG
from oracle.bases import edit_config
from oracle.command import listing, merged, run
from oracle.mixtures import EXPERTS, WIDTH, MixtureBase, as_saved, make_mixture

R = 3


def over_stacks(path: Path, base: MixtureBase, **settings: Any) -> Path:
    return oracle.make_adapter(
        path, base, **({"target_parameters": base.parameters, "lora_dropout": 0.0, "target_modules": []} | settings)
    )


def turned(tensors: dict[str, Any]) -> dict[str, Any]:
    """The same update with A over what B was over, as the other convention has it: `(B A)^T = A^T B^T`."""
    found = {}
    for key, value in tensors.items():
        if "experts" not in key:
            found[key] = value
        elif "lora_A" in key:  # [experts * r, in] becomes [in, r * experts], the experts side by side for each rank
            other = value.reshape(EXPERTS, R, -1).permute(2, 1, 0).reshape(value.shape[1], -1)
            found[key.replace("lora_A", "lora_B")] = other.contiguous()
        else:
            other = value.reshape(-1, R, EXPERTS).permute(2, 1, 0).reshape(-1, value.shape[0])
            found[key.replace("lora_B", "lora_A")] = other.contiguous()
    return found


def one_after_another(tensors: dict[str, Any]) -> dict[str, Any]:
    """lora_B as unsloth's forward had it until September 2026: `[out, experts, r]`."""
    return {
        k: v.reshape(-1, R, EXPERTS).transpose(1, 2).reshape(v.shape).contiguous() if "lora_B" in k else v
        for k, v in tensors.items()
    }


def rewritten(adapter: Path, path: Path, change: Callable[[dict[str, Any]], dict[str, Any]], **config: Any) -> Path:
    found = oracle.rewrite_adapter(adapter, path, change=change)
    edit_config(found, CONFIG, **config)
    return found


def expect_refused(adapter: Path, base: MixtureBase, *words: str) -> None:
    before = listing(adapter.parent)
    ran = run("merge-lora", adapter, adapter.parent / "out", "--base", base.path)
    assert ran.code == 3, ran.text
    assert not [w for w in words if w not in ran.text], ran.text
    assert listing(adapter.parent) == before


@pytest.mark.parametrize(
    ("family", "version"),
    [
        ("qwen3_moe", "0.18.1"),
        pytest.param("qwen3_moe", "0.19.0", marks=pytest.mark.slow),
        pytest.param("mixtral", None, marks=pytest.mark.slow),
        pytest.param("llama4", "0.18.1", marks=pytest.mark.slow),
        pytest.param("gpt_oss", "0.19.0", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("stacked", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_older_layout_is_read_off_the_shapes(family: str, version: str | None, stacked: bool, tmp_path: Path) -> None:
    """PEFT itself fails on such an adapter: its shapes are not those that it makes today."""
    base = make_mixture(tmp_path / "base", family, dtype="bfloat16", stacked=stacked)
    adapter = over_stacks(tmp_path / "adapter", base)
    expected = oracle.peft_merge(base, adapter)
    older = rewritten(adapter, tmp_path / "older", turned, peft_version=version)
    merged(older, tmp_path / "out", "--base", base.path, "--numerics", "peft")
    oracle.same_bits(as_saved(tmp_path / "out", base, dtype="bfloat16"), expected)


def square(path: Path, family: str = "qwen3_moe", **more: Any) -> MixtureBase:
    """A mixture whose `down_proj` has as many rows as columns, and whose `gate_up_proj` has not."""
    inner = {"intermediate_size": WIDTH} if family == "gpt_oss" else {"moe_intermediate_size": WIDTH}
    return make_mixture(path, family, **inner, **more)


@pytest.mark.parametrize("is_older", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_square_matrix_is_laid_out_as_the_other_one_of_its_adapter(is_older: bool, tmp_path: Path) -> None:
    base = square(tmp_path / "base")
    adapter = over_stacks(tmp_path / "adapter", base)
    expected = oracle.peft_merge(base, adapter)
    change = turned if is_older else dict
    unsaid = rewritten(adapter, tmp_path / "unsaid", change, peft_version=None)
    merged(unsaid, tmp_path / "out", "--base", base.path, "--numerics", "peft")
    oracle.same_bits(oracle.read_tensors(tmp_path / "out"), expected)


@pytest.mark.parametrize(
    ("family", "version", "is_older"),
    [
        ("qwen3_moe", "0.18.1", True),
        pytest.param("qwen3_moe", "0.19.0", True, marks=pytest.mark.slow),
        pytest.param("qwen3_moe", "0.19.1", False, marks=pytest.mark.slow),
        pytest.param("qwen3_moe", "0.21.3.dev0", False, marks=pytest.mark.slow),
        pytest.param("gpt_oss", "0.18.0", False, marks=pytest.mark.slow),
        pytest.param("gpt_oss", "0.19.0", True, marks=pytest.mark.slow),
        pytest.param("gpt_oss", "0.19.1", False, marks=pytest.mark.slow),
    ],
)
def test_square_matrix_alone_is_laid_out_as_its_version_of_peft_did(
    family: str, version: str, is_older: bool, tmp_path: Path
) -> None:
    """gpt-oss's own `down_proj` is square: 2880 by 2880."""
    base = square(tmp_path / "base", family)
    adapter = over_stacks(tmp_path / "adapter", base, target_parameters=["experts.down_proj"])
    expected = oracle.peft_merge(base, adapter)
    dated = rewritten(adapter, tmp_path / "dated", turned if is_older else dict, peft_version=version)
    merged(dated, tmp_path / "out", "--base", base.path, "--numerics", "peft")
    oracle.same_bits(oracle.read_tensors(tmp_path / "out"), expected)


def test_square_matrix_alone_without_a_version_is_refused(tmp_path: Path) -> None:
    base = square(tmp_path / "base")
    adapter = over_stacks(tmp_path / "adapter", base, target_parameters=["experts.down_proj"])
    edit_config(adapter, CONFIG, peft_version=...)
    expect_refused(adapter, base, "square", "peft_version")


@pytest.mark.parametrize("stacked", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_experts_one_after_another_in_lora_b_are_read_where_the_config_says_so(stacked: bool, tmp_path: Path) -> None:
    base = make_mixture(tmp_path / "base", "qwen3_moe", stacked=stacked)
    adapter = over_stacks(tmp_path / "adapter", base)
    expected = oracle.peft_merge(base, adapter)
    other = rewritten(adapter, tmp_path / "other", one_after_another, lora_B_layout="grouped_by_expert")
    merged(other, tmp_path / "out", "--base", base.path, "--numerics", "peft")
    oracle.same_bits(as_saved(tmp_path / "out", base, dtype="float32"), expected)
    edit_config(adapter, CONFIG, lora_B_layout="rank_major", auto_mapping={"unsloth_fixed": True})
    merged(adapter, tmp_path / "same", "--base", base.path, "--numerics", "peft")
    oracle.same_bits(as_saved(tmp_path / "same", base, dtype="float32"), expected)


def test_adapter_of_unsloth_that_does_not_say_its_layout_is_refused(tmp_path: Path) -> None:
    base = make_mixture(tmp_path / "base", "qwen3_moe")
    adapter = over_stacks(tmp_path / "adapter", base)
    edit_config(adapter, CONFIG, auto_mapping={"unsloth_fixed": True})
    expect_refused(adapter, base, "unsloth", "lora_B_layout", "grouped_by_expert")
    edit_config(adapter, CONFIG, auto_mapping=None, base_model_name_or_path="unsloth/Qwen3-30B-A3B")
    expect_refused(adapter, base, "unsloth", "lora_B_layout")
    edit_config(adapter, CONFIG, base_model_name_or_path="Qwen/Qwen3-30B-A3B", lora_B_layout="sideways")
    expect_refused(adapter, base, "lora_B_layout", "sideways")
