"""Adapters without a task type: the class that they name, or the head that they bring, says what they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import oracle
from oracle.adapters import WEIGHTS
from oracle.bases import Base, edit_config, quiet
from oracle.command import listing, merged, run
from oracle.expected import load_output, logits, relative_difference

FAMILIES = ["llama", "qwen2", "gemma2", "mistral"]
INPUTS = {"input_ids": torch.arange(5, 25).reshape(2, 10)}


def _with_add_adapter(base: Base, folder: Path) -> Any:
    """What transformers' own `add_adapter` saves of a trained reward model, and what that model said."""
    import peft

    with quiet():
        model = base.load(task="SEQ_CLS", num_labels=1, pad_token_id=0)
        model.add_adapter(peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"], modules_to_save=["score"]))
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for value in (p for p in model.parameters() if p.requires_grad):
                value.copy_((torch.randn(value.shape, generator=generator) * 0.1).to(value.dtype))
        model.save_pretrained(folder)
        return logits(model.float(), INPUTS)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_head_that_add_adapter_saved_makes_a_reward_model(family: str, tmp_path: Path) -> None:
    base = oracle.make_base(tmp_path / "base", family)
    said = _with_add_adapter(base, tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["task_type"] is None
    merged(tmp_path / "adapter", tmp_path / "out", "--base", base.path)
    model = load_output(tmp_path / "out", "AutoModelForSequenceClassification")
    assert type(model).__name__.endswith("ForSequenceClassification")
    model.config.pad_token_id = 0
    assert relative_difference(logits(model, INPUTS), said) < 1e-2


def _naming_its_class(base: Base, folder: Path, name: str, *, head: bool) -> Path:
    """An adapter as PEFT saves it of a class and without a task type."""
    adapter = oracle.make_adapter(folder, base, task="SEQ_CLS")
    edit_config(adapter, "adapter_config.json", task_type=None, modules_to_save=None)
    edit_config(adapter, "adapter_config.json", auto_mapping={"base_model_class": name, "parent_library": "x"})
    if not head:
        kept = {k: v for k, v in load_file(adapter / WEIGHTS).items() if "score" not in k}
        save_file(kept, adapter / WEIGHTS, {"format": "pt"})
    return adapter


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("own", [True, False])
def test_a_reward_adapter_without_its_head_is_refused(family: str, own: bool, tmp_path: Path) -> None:
    """Never a causal language model: the class says that it was a reward model, transformers' or a trainer's own."""
    base = oracle.make_base(tmp_path / "base", family)
    config = transformers.AutoConfig.from_pretrained(base.path)
    of_transformers = config.architectures[0].replace("ForCausalLM", "ForSequenceClassification")
    name = of_transformers if own else "RewardModel"
    adapter = _naming_its_class(base, tmp_path / "adapter", name, head=False)
    before = listing(tmp_path)
    ran = run("merge-lora", adapter, tmp_path / "out", "--base", base.path)
    assert ran.code == 3 and "head-missing" in ran.text
    assert listing(tmp_path) == before
    ran = run("convert", adapter, tmp_path / "out", "--base", base.path, "--to", "trl", "--role", "reward")
    assert ran.code == 3 and "head-missing" in ran.text


@pytest.mark.parametrize("family", FAMILIES)
def test_the_class_that_an_adapter_names_stands_for_its_task(family: str, tmp_path: Path) -> None:
    base = oracle.make_base(tmp_path / "base", family)
    name = transformers.AutoConfig.from_pretrained(base.path).architectures[0]
    name = name.replace("ForCausalLM", "ForSequenceClassification")
    adapter = _naming_its_class(base, tmp_path / "adapter", name, head=True)
    merged(adapter, tmp_path / "out", "--base", base.path)
    expected = oracle.peft_logits(
        base, oracle.make_adapter(tmp_path / "same", base, task="SEQ_CLS"), task="SEQ_CLS", inputs=INPUTS
    )
    model = load_output(tmp_path / "out", "AutoModelForSequenceClassification")
    model.config.pad_token_id = 0
    assert relative_difference(logits(model, INPUTS), expected) < 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_alpha_0_is_refused_and_given_with_lora_alpha(family: str, tmp_path: Path) -> None:
    """verl's merger writes 0; with the alpha of training the merge is that of the adapter that records it."""
    base = oracle.make_base(tmp_path / "base", family)
    adapter = oracle.make_adapter(tmp_path / "adapter", base, lora_alpha=5)
    merged(adapter, tmp_path / "right", "--base", base.path)
    edit_config(adapter, "adapter_config.json", lora_alpha=0)
    ran = run("merge-lora", adapter, tmp_path / "out", "--base", base.path)
    assert (
        ran.code == 3 and "no-op" in ran.text and "--lora-alpha and the lora_alpha of the training script" in ran.text
    )
    merged(adapter, tmp_path / "out", "--base", base.path, "--lora-alpha", "5")
    oracle.same_bits(oracle.read_tensors(tmp_path / "out"), oracle.read_tensors(tmp_path / "right"))


def test_an_alpha_that_is_recorded_is_not_overridden(tmp_path: Path) -> None:
    base = oracle.make_base(tmp_path / "base")
    adapter = oracle.make_adapter(tmp_path / "adapter", base, lora_alpha=5)
    ran = run("merge-lora", adapter, tmp_path / "out", "--base", base.path, "--lora-alpha", "8")
    assert ran.code == 2 and "lora-alpha-recorded" in ran.text


def test_convert_takes_the_alpha_of_a_reward_adapter(tmp_path: Path) -> None:
    base = oracle.make_base(tmp_path / "base")
    adapter = oracle.make_adapter(tmp_path / "adapter", base, task="SEQ_CLS", lora_alpha=5)
    common = ["--base", base.path, "--to", "trl", "--role", "reward", "-q"]
    assert run("convert", adapter, tmp_path / "right", *common).code == 0
    edit_config(adapter, "adapter_config.json", lora_alpha=0)
    assert run("convert", adapter, tmp_path / "out", *common).code == 3
    assert run("convert", adapter, tmp_path / "out", *common, "--lora-alpha", "5").code == 0
    oracle.same_bits(oracle.read_tensors(tmp_path / "out"), oracle.read_tensors(tmp_path / "right"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("family", FAMILIES[:3])
def test_values_that_are_not_finite_are_refused_by_tensor_and_count(family: str, value: float, tmp_path: Path) -> None:
    base = oracle.make_base(tmp_path / "base", family)
    adapter = oracle.make_adapter(tmp_path / "adapter", base)
    tensors = load_file(adapter / WEIGHTS)
    key = next(k for k in tensors if "layers.1" in k and "lora_A" in k)
    tensors[key].view(-1)[:3] = value
    save_file(tensors, adapter / WEIGHTS, {"format": "pt"})
    ran = run("merge-lora", adapter, tmp_path / "out", "--base", base.path)
    assert ran.code == 3 and "nonfinite" in ran.text
    assert "3 such values" in ran.text and key in ran.text
    assert not (tmp_path / "out").exists()


def test_optimizer_settings_of_an_old_ms_swift_are_no_obstacle(tmp_path: Path) -> None:
    base = oracle.make_base(tmp_path / "base")
    adapter = oracle.make_adapter(tmp_path / "adapter", base)
    merged(adapter, tmp_path / "right", "--base", base.path)
    edit_config(adapter, "adapter_config.json", lora_dtype="AUTO", lorap_lr_ratio=16.0, lorap_emb_lr=1e-6)
    merged(adapter, tmp_path / "out", "--base", base.path)
    oracle.same_bits(oracle.read_tensors(tmp_path / "out"), oracle.read_tensors(tmp_path / "right"))
