"""Everything in an adapter's folder is accounted for: parts trained whole, states under other names, unknown files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import oracle
from oracle.adapters import WEIGHTS
from oracle.command import listing, merged, run
from oracle.families import make_family
from selected import each_value

PARTS = {"llava": "multi_modal_projector", "qwen2_vl": "visual.merger", "paligemma": "multi_modal_projector"}
FAMILIES = ["llama", "gpt2", "gpt_neox"]


def _split(adapter: Path, part: str, file: str) -> dict[str, Any]:
    """Takes the tensors of a module out of an adapter and saves them as LLaVA's trainer does."""
    tensors = load_file(adapter / WEIGHTS)
    apart = {k: v for k, v in tensors.items() if part in k}
    assert apart
    torch.save(apart, adapter / file)
    save_file({k: v for k, v in tensors.items() if k not in apart}, adapter / WEIGHTS, {"format": "pt"})
    return apart


@pytest.mark.parametrize(
    ("family", "file"), each_value(sorted(PARTS), ["non_lora_trainables.bin", "non_lora_state_dict.bin"])
)
def test_parts_that_were_trained_whole_are_merged_with_the_adapter(family: str, file: str, tmp_path: Path) -> None:
    base = make_family(tmp_path / "base", family)
    part = PARTS[family].rpartition(".")[2]
    adapter = oracle.make_adapter(
        tmp_path / "adapter", base, target_modules=r".*language_model.*\.q_proj", modules_to_save=[part]
    )
    expected = oracle.peft_merge(base, adapter)
    _split(adapter, f".{part}.", file)
    from oracle.bases import edit_config

    edit_config(adapter, "adapter_config.json", modules_to_save=None)
    merged(adapter, tmp_path / "out", "--base", base.path, "--numerics", "peft")
    oracle.same_bits(oracle.read_tensors(tmp_path / "out"), expected)
    before = oracle.read_tensors(base.path)
    assert any(not before[n].equal(t) for n, t in expected.items() if part in n)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_part_that_fits_nowhere_is_refused_with_its_file(family: str, tmp_path: Path) -> None:
    base = oracle.make_base(tmp_path / "base", family)
    adapter = oracle.make_adapter(tmp_path / "adapter", base)
    torch.save({"base_model.model.mm_projector.0.weight": torch.ones(4, 4)}, adapter / "non_lora_trainables.bin")
    before = listing(tmp_path)
    ran = run("merge-lora", adapter, tmp_path / "out", "--base", base.path)
    assert ran.code == 3 and "non_lora_trainables.bin" in ran.text and "mm_projector" in ran.text
    assert listing(tmp_path) == before


@pytest.mark.parametrize("family", FAMILIES)
def test_a_weight_file_that_nobody_knows_is_refused_until_it_is_allowed(family: str, tmp_path: Path) -> None:
    base = oracle.make_base(tmp_path / "base", family)
    adapter = oracle.make_adapter(tmp_path / "adapter", base)
    save_file({"tower.weight": torch.ones(3)}, adapter / "extra.safetensors")
    ran = run("merge-lora", adapter, tmp_path / "out", "--base", base.path)
    assert ran.code == 3 and "adapter-files-unread" in ran.text and "extra.safetensors" in ran.text
    ran = run("merge-lora", adapter, tmp_path / "out", "--base", base.path, "--allow", "adapter-files-unread")
    assert ran.code == 0, ran.err


@pytest.mark.parametrize("family", FAMILIES)
def test_a_copy_of_the_adapter_is_no_obstacle(family: str, tmp_path: Path) -> None:
    base = oracle.make_base(tmp_path / "base", family)
    adapter = oracle.make_adapter(tmp_path / "adapter", base)
    save_file(load_file(adapter / WEIGHTS), adapter / "adapter_copy.safetensors")
    merged(adapter, tmp_path / "out", "--base", base.path)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_an_adapter_under_the_name_of_fsdps_state_is_the_adapter(family: str, tmp_path: Path) -> None:
    base = oracle.make_base(tmp_path / "base", family)
    adapter = oracle.make_adapter(tmp_path / "adapter", base, task="SEQ_CLS")
    merged(adapter, tmp_path / "right", "--base", base.path)
    tensors = load_file(adapter / WEIGHTS)
    torch.save(tensors, adapter / "pytorch_model_fsdp.bin")
    (adapter / WEIGHTS).unlink()
    merged(adapter, tmp_path / "out", "--base", base.path)
    oracle.same_bits(oracle.read_tensors(tmp_path / "out"), oracle.read_tensors(tmp_path / "right"))
    ran = run("doctor", adapter, "--base", base.path)
    assert ran.code == 1 and "adapter-named-otherwise" in ran.text and " mv " not in ran.text
    assert run("repair", adapter, tmp_path / "fixed", "--base", base.path, "-q").code == 0
    oracle.same_bits(load_file(tmp_path / "fixed" / WEIGHTS), tensors)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_model_under_that_name_is_not_taken_for_an_adapter(family: str, tmp_path: Path) -> None:
    base = oracle.make_base(tmp_path / "base", family)
    adapter = oracle.make_adapter(tmp_path / "adapter", base)
    whole = {f"base_model.model.{n}": t for n, t in oracle.read_tensors(base.path).items()}
    torch.save({**whole, **load_file(adapter / WEIGHTS)}, adapter / "pytorch_model_fsdp.bin")
    (adapter / WEIGHTS).unlink()
    ran = run("inspect", adapter)
    assert "adapter and nothing else" not in ran.text


def _as_tinker(tensors: dict[str, Any]) -> dict[str, Any]:
    return {k.replace("model.lm_head", "model.model.unembed_tokens"): v for k, v in tensors.items()}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_tinkers_name_of_the_output_embedding_is_read(family: str, tied: bool, tmp_path: Path) -> None:
    base = oracle.make_base(tmp_path / "base", family, tied=tied)
    adapter = oracle.make_adapter(tmp_path / "adapter", base, target_modules=["q_proj", "lm_head"])
    tensors = {k: v for k, v in load_file(adapter / WEIGHTS).items() if "base_layer" not in k}
    save_file(tensors, adapter / WEIGHTS, {"format": "pt"})
    merged(adapter, tmp_path / "right", "--base", base.path)
    save_file(_as_tinker(tensors), adapter / WEIGHTS, {"format": "pt"})
    merged(adapter, tmp_path / "out", "--base", base.path)
    oracle.same_bits(oracle.read_tensors(tmp_path / "out"), oracle.read_tensors(tmp_path / "right"))


@pytest.mark.parametrize("shared", [True, False])
def test_tinkers_stacked_experts_are_taken_apart(shared: bool, tmp_path: Path) -> None:
    """The oracle is the plain sum: every expert's weight plus its own pair's product; a shared factor has one row."""
    base = make_family(tmp_path / "base", "qwen3_moe")
    before = oracle.read_tensors(base.path)
    experts = len({n.split(".experts.")[1].split(".")[0] for n in before if ".experts." in n})
    prefix, generator, held, expected = "model.layers.0.mlp.experts", torch.Generator().manual_seed(4), {}, {}
    for part, name in {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}.items():
        rows, columns = before[f"{prefix}.0.{name}.weight"].shape
        a = torch.randn(1 if shared else experts, 4, columns, generator=generator) * 0.1
        b = torch.randn(experts, rows, 4, generator=generator) * 0.1
        for factor, tensor in (("A", a), ("B", b)):
            held[f"base_model.model.{prefix}.{part}.lora_{factor}.weight"] = tensor
        for each in range(experts):
            key = f"{prefix}.{each}.{name}.weight"
            update = b[each] @ a[0 if shared else each] * 2
            expected[key] = (before[key].float() + update).to(before[key].dtype)
    adapter = oracle.make_adapter(tmp_path / "adapter", base, target_modules=["q_proj"], r=4, lora_alpha=8)
    save_file(held, adapter / WEIGHTS, {"format": "pt"})
    merged(adapter, tmp_path / "out", "--base", base.path)
    after = oracle.read_tensors(tmp_path / "out")
    for key, tensor in expected.items():
        torch.testing.assert_close(after[key], tensor, rtol=1e-2, atol=1e-3)
    assert all(after[n].equal(t) for n, t in before.items() if n not in expected)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_an_adapter_of_mlx_is_the_same_update_transposed(family: str, tmp_path: Path) -> None:
    """mlx-lm writes `[in, r]` and `[r, out]`, a scale, and every option of the run into its config."""
    base = oracle.make_base(tmp_path / "base", family)
    adapter = oracle.make_adapter(tmp_path / "adapter", base, target_modules=["q_proj", "o_proj"], r=4, lora_alpha=10)
    merged(adapter, tmp_path / "right", "--base", base.path)
    tensors = {
        k.removeprefix("base_model.model.").replace("_A.weight", "_a").replace("_B.weight", "_b"): v.T.contiguous()
        for k, v in load_file(adapter / WEIGHTS).items()
    }
    (adapter / WEIGHTS).unlink()
    save_file(tensors, adapter / "adapters.safetensors", {"format": "mlx"})
    config = {
        "fine_tune_type": "lora", "model": "somewhere/else", "num_layers": 16, "iters": 600, "train": True,
        "lora_parameters": {"rank": 4, "dropout": 0.0, "scale": 2.5},
    }  # fmt: skip
    (adapter / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    merged(adapter, tmp_path / "out", "--base", base.path)
    oracle.same_bits(oracle.read_tensors(tmp_path / "out"), oracle.read_tensors(tmp_path / "right"))
