"""Merges over a quantised base: what the adapter leaves alone stays as it lies, the rest is made whole by consent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import oracle
import quantised
from gpt_oss import as_transformers_loads, small_gpt_oss
from oracle.bases import edit_config, quiet, read_config, read_tensors, write_tensors
from oracle.command import listing, merged, run


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype is b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def loads_whole(folder: Path) -> Any:
    """The model as transformers loads it, with nothing missing and nothing left over."""
    with quiet():
        model, told = transformers.AutoModelForCausalLM.from_pretrained(
            folder, output_loading_info=True, dtype=torch.bfloat16
        )
    assert not any(told[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), told
    return model


@pytest.mark.parametrize("kind", quantised.KINDS)
def test_weights_that_the_adapter_leaves_alone_stay_quantised(kind: str, tmp_path: Path) -> None:
    folder = quantised.make(tmp_path, kind, modules=quantised.MLP)
    adapter = oracle.make_adapter(tmp_path / "adapter", folder.whole, target_modules=["q_proj", "v_proj"])
    ran = merged(adapter, tmp_path / "out", "--base", folder.path, "--numerics", "peft")
    assert "stay quantised" in ran.text
    before, after = read_tensors(folder.path), read_tensors(tmp_path / "out")
    expected = oracle.peft_merge(folder.whole, adapter)
    assert after.keys() == before.keys()
    adapted = {n for n in before if n.endswith(("q_proj.weight", "v_proj.weight"))}
    assert all(same_bytes(after[n], expected[n]) for n in adapted)
    assert all(same_bytes(after[n], before[n]) for n in before.keys() - adapted)
    assert read_config(tmp_path / "out") == read_config(folder.path)


@pytest.mark.parametrize("kind", quantised.KINDS)
def test_adapted_weights_that_are_quantised_are_refused_with_the_way_on(kind: str, tmp_path: Path) -> None:
    folder = quantised.make(tmp_path, kind)
    adapter = oracle.make_adapter(tmp_path / "adapter", folder.whole, target_modules=["q_proj"])
    before = listing(tmp_path)
    ran = run("merge-lora", adapter, tmp_path / "out", "--base", folder.path)
    assert (ran.code, listing(tmp_path)) == (3, before)
    assert "REFUSED base-quantised" in ran.text and "layers.{0..1}.self_attn.q_proj.weight" in ran.text
    assert "--dequantize" in ran.text


@pytest.mark.parametrize("kind", quantised.KINDS)
def test_dequantised_merge_is_the_merge_of_peft_over_the_whole_weights(kind: str, tmp_path: Path) -> None:
    folder = quantised.make(tmp_path, kind, sharded=True)
    adapter = oracle.make_adapter(tmp_path / "adapter", folder.whole, use_dora=kind == "nf4")
    ran = merged(adapter, tmp_path / "out", "--base", folder.path, "--dequantize", "--numerics", "peft")
    oracle.same_bits(read_tensors(tmp_path / "out"), oracle.peft_merge(folder.whole, adapter))
    assert "quantization_config" not in read_config(tmp_path / "out")
    assert "merged onto the dequantised weights" in ran.text
    receipt = json.loads((tmp_path / "out" / "rlhf-convert.json").read_text())
    assert "dequantised" in [note[1] for note in receipt["notes"]]
    loads_whole(tmp_path / "out")


@pytest.mark.parametrize("kind", ["fp8-blocks", "nf4-nested", "gptq"])
def test_reshard_makes_a_16_bit_model_of_a_quantised_one(kind: str, tmp_path: Path) -> None:
    folder = quantised.make(tmp_path, kind)
    ran = run("reshard", folder.path, tmp_path / "out", "--dequantize", "--max-shard-size", "100KB")
    assert ran.code == 0, ran.text
    oracle.same_bits(read_tensors(tmp_path / "out"), read_tensors(folder.whole.path))
    assert "quantization_config" not in read_config(tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in read_tensors(folder.whole.path).values())
    loads_whole(tmp_path / "out")


def test_reshard_alone_copies_a_quantised_model_as_it_lies(tmp_path: Path) -> None:
    folder = quantised.make(tmp_path, "nf4", sharded=True)
    assert run("reshard", folder.path, tmp_path / "out", "--layout", "pack").code == 0
    before, after = read_tensors(folder.path), read_tensors(tmp_path / "out")
    assert after.keys() == before.keys() and all(same_bytes(after[n], before[n]) for n in before)
    assert read_config(tmp_path / "out") == read_config(folder.path)


def test_attention_lora_over_mxfp4_experts_copies_them(tmp_path: Path) -> None:
    tensors = small_gpt_oss(tmp_path / "base")
    live = as_transformers_loads(tmp_path / "base", transformers.Mxfp4Config(dequantize=True))
    shape = {
        n: (n, torch.zeros(4, live[n].shape[1]), torch.zeros(live[n].shape[0], 4)) for n in live if "q_proj.weight" in n
    }
    generator = torch.Generator().manual_seed(9)
    factors = {}
    for name, (_, a, b) in shape.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        factors[f"{module}.lora_A.weight"] = torch.randn(a.shape, generator=generator)
        factors[f"{module}.lora_B.weight"] = torch.randn(b.shape, generator=generator)
    (tmp_path / "adapter").mkdir()
    quantised.torch_save(factors, tmp_path / "adapter" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))

    merged(tmp_path / "adapter", tmp_path / "kept", "--base", tmp_path / "base")
    kept = read_tensors(tmp_path / "kept")
    assert kept.keys() == tensors.keys()
    for name, value in tensors.items():
        if "q_proj.weight" in name:
            a, b = (factors[f"base_model.model.{name.removesuffix('.weight')}.lora_{f}.weight"] for f in "AB")
            assert torch.equal(kept[name], (value.float() + 2 * (b @ a)).to(torch.bfloat16))
        else:
            assert same_bytes(kept[name], value), name

    merged(tmp_path / "adapter", tmp_path / "whole", "--base", tmp_path / "base", "--dequantize")
    whole = read_tensors(tmp_path / "whole")
    assert all(torch.equal(whole[n], live[n]) for n in live if "q_proj.weight" not in n)
    assert all(torch.equal(whole[n], kept[n]) for n in live if "q_proj.weight" in n)
    loads_whole(tmp_path / "whole")


def test_fp8_is_what_transformers_dequantises(tmp_path: Path) -> None:
    plain = oracle.make_base(tmp_path / "plain", dtype="bfloat16", intermediate=256, hidden=128, vocab=64)
    tensors: dict[str, torch.Tensor] = {}
    for name, value in read_tensors(plain.path).items():
        if name.endswith(("gate_proj.weight", "up_proj.weight", "down_proj.weight", "q_proj.weight", "o_proj.weight")):
            tensors |= quantised.fp8_blocks(name, value, (128, 128))[0]
        else:
            tensors[name] = value
    write_tensors(plain.path, tensors)
    said = {"quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": ["k_proj", "v_proj"]}
    edit_config(plain.path, quantization_config=said)
    assert run("reshard", plain.path, tmp_path / "out", "--dequantize").code == 0
    config = transformers.FineGrainedFP8Config(dequantize=True, modules_to_not_convert=["k_proj", "v_proj", "lm_head"])
    live = as_transformers_loads(plain.path, config)
    whole = read_tensors(tmp_path / "out")
    assert all(torch.equal(whole[n], live[n]) for n in whole)
    loads_whole(tmp_path / "out")


def test_the_full_precision_base_is_named_where_it_is_known(tmp_path: Path) -> None:
    folder = quantised.make(tmp_path, "nf4")
    adapter = oracle.make_adapter(tmp_path / "adapter", folder.whole, target_modules=["q_proj"])

    def refusal(recorded: str, card: str = "") -> str:
        edit_config(adapter, "adapter_config.json", base_model_name_or_path=recorded)
        (folder.path / "README.md").write_text(card)
        ran = run("merge-lora", adapter, tmp_path / "out", "--base", folder.path)
        assert ran.code == 3
        return ran.text

    assert "--base unsloth/Qwen2.5-7B" in refusal("unsloth/Qwen2.5-7B-bnb-4bit")
    assert "--base unsloth/Llama-3.2-1B " in refusal("unsloth/Llama-3.2-1B-unsloth-bnb-4bit") + " "
    assert "or merge" not in refusal("unsloth/gpt-oss-20b-unsloth-bnb-4bit")
    assert "or merge" not in refusal("deepseek-ai/DeepSeek-V3")
    assert "or merge" not in refusal("someone/Qwen2.5-7B-GPTQ-Int4")
    card = "---\nbase_model: Qwen/Qwen2.5-7B\nbase_model_relation: quantized\n---\n# A model\n"
    assert "--base Qwen/Qwen2.5-7B" in refusal("/data/models/mine", card)
    assert "or merge" not in refusal("/data/models/mine", card.replace("quantized", "finetune"))


def test_a_16_bit_base_of_an_adapter_trained_in_4_bits_is_reported(tmp_path: Path) -> None:
    folder = quantised.make(tmp_path, "nf4")
    adapter = oracle.make_adapter(tmp_path / "adapter", folder.whole, target_modules=["q_proj"])
    edit_config(adapter, "adapter_config.json", base_model_name_or_path="unsloth/Qwen2.5-7B-bnb-4bit")
    ran = merged(adapter, tmp_path / "out", "--base", folder.whole.path)
    assert "trained over unsloth/Qwen2.5-7B-bnb-4bit, which is quantised" in ran.text


def test_dequantize_of_what_is_whole_is_refused(tmp_path: Path) -> None:
    plain = oracle.make_base(tmp_path / "plain")
    ran = run("reshard", plain.path, tmp_path / "out", "--dequantize")
    assert ran.code == 3 and "not-quantised" in ran.text and not (tmp_path / "out").exists()
