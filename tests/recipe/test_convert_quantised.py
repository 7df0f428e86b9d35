"""`convert --dequantize`: a reward adapter over a quantised base, and a quantised reward model, in one pass."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import oracle
import quantised
from oracle.bases import edit_config, read_config, read_tensors, write_tensors
from oracle.command import listing, run


@pytest.mark.parametrize("kind", ["nf4-nested", "fp8-blocks"])
def test_a_reward_adapter_over_a_quantised_base_is_converted_in_one_pass(kind: str, tmp_path: Path) -> None:
    folder = quantised.make(tmp_path, kind)
    adapter = oracle.make_adapter(tmp_path / "adapter", folder.whole, task="SEQ_CLS")
    arguments = ("convert", adapter, tmp_path / "rm", "--to", "openrlhf", "--role", "reward", "--base", folder.path)
    before = listing(tmp_path)
    ran = run(*arguments)
    assert (ran.code, listing(tmp_path)) == (3, before)
    assert "base-quantised" in ran.text and "--dequantize" in ran.text

    ran = run(*arguments, "--dequantize")
    assert ran.code == 0, ran.err
    expected = oracle.peft_merge(folder.whole, adapter, task="SEQ_CLS")
    found = read_tensors(tmp_path / "rm")
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[n].float(), expected[n].float(), rtol=2**-7, atol=0) for n in expected)
    assert torch.equal(found["score.weight"], expected["score.weight"])
    assert "quantization_config" not in read_config(tmp_path / "rm")


def test_a_quantised_reward_model_becomes_a_whole_critic(tmp_path: Path) -> None:
    folder = quantised.make(tmp_path, "gptq")
    head = {"score.weight": torch.randn(1, 64, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)}
    tensors = {n: t for n, t in read_tensors(folder.path).items() if n != "lm_head.weight"} | head
    write_tensors(folder.path, tensors)
    labels = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "pad_token_id": 0}
    edit_config(folder.path, architectures=["LlamaForSequenceClassification"], **labels)
    ran = run("rm-to-critic", folder.path, tmp_path / "critic", "--to", "verl", "--dequantize")
    assert ran.code == 0, ran.err
    expected = {n: t for n, t in read_tensors(folder.whole.path).items() if n != "lm_head.weight"} | head
    found = read_tensors(tmp_path / "critic")
    assert not found.pop("score.bias").any()  # verl's class has one, and the reward model none
    oracle.same_bits(found, expected)
    assert "quantization_config" not in read_config(tmp_path / "critic")


def test_what_is_whole_already_is_not_dequantised(tmp_path: Path) -> None:
    base = oracle.make_base(tmp_path / "base")
    adapter = oracle.make_adapter(tmp_path / "adapter", base, task="SEQ_CLS")
    ran = run("convert", adapter, tmp_path / "rm", "--to", "openrlhf", "--role", "reward", "--dequantize")
    assert ran.code == 3 and "not-quantised" in ran.text and not (tmp_path / "rm").exists()
