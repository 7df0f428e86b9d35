"""Classification heads over families of every kind: the class of the family, whole, with nothing that it lacks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import oracle
from oracle.bases import quiet
from oracle.command import merged, run
from oracle.expected import inputs_for
from oracle.families import FamilyBase, make_family, marked, tie

CLOSE = 4e-6
CLASSIFIER = "AutoModelForSequenceClassification"


def _for_classification(base: FamilyBase) -> FamilyBase:
    """The same base for an adapter with a task type, which is then put on the family's classification class."""
    return dataclasses.replace(base, auto="AutoModelForCausalLM")


def _pad(config: Any) -> None:
    config.pad_token_id = 0


HEADS: dict[str, tuple[str, str | None, Callable[[Any], None] | None]] = {
    "bert": ("BertForSequenceClassification", "AutoModel", None),
    "bert-pretrained": ("BertForSequenceClassification", "AutoModelForPreTraining", None),
    "roberta": ("RobertaForSequenceClassification", "AutoModel", None),
    "roberta-masked": ("RobertaForSequenceClassification", "AutoModelForMaskedLM", None),
    "distilbert": ("DistilBertForSequenceClassification", "AutoModelForMaskedLM", None),
    "mixtral": ("MixtralForSequenceClassification", None, None),
    "qwen3_moe": ("Qwen3MoeForSequenceClassification", None, None),
    "gemma3_text": ("Gemma3TextForSequenceClassification", None, None),
    "falcon": ("FalconForSequenceClassification", None, None),
    "bloom": ("BloomForSequenceClassification", None, None),
    "phi3": ("Phi3ForSequenceClassification", None, None),
    "mpt": ("MptForSequenceClassification", None, _pad),
    "gpt_bigcode": ("GPTBigCodeForSequenceClassification", None, _pad),
    "stablelm": ("StableLmForSequenceClassification", None, None),
    "deepseek_v3": ("DeepseekV3ForSequenceClassification", None, None),
}


@pytest.mark.parametrize("name", marked(HEADS, {"bert", "roberta", "roberta-masked", "mixtral", "gemma3_text"}))
def test_reward_adapter_becomes_the_familys_classification_class(name: str, tmp_path: Path) -> None:
    architecture, auto, change = HEADS[name]
    base = _for_classification(make_family(tmp_path / "base", name.split("-", maxsplit=1)[0], auto=auto, change=change))
    adapter = oracle.make_adapter(tmp_path / "adapter", base, task="SEQ_CLS")
    merged(adapter, tmp_path / "out", "--base", base.path, "--numerics", "peft")
    oracle.same_bits(oracle.read_tensors(tmp_path / "out"), oracle.peft_merge(base, adapter, task="SEQ_CLS"))
    config = oracle.read_config(tmp_path / "out")
    assert config["architectures"] == [architecture]
    assert len(config["id2label"]) == 1
    model = oracle.load_output(tmp_path / "out", CLASSIFIER)
    inputs = inputs_for(base)
    forward = oracle.peft_logits(base, adapter, task="SEQ_CLS", inputs=inputs)
    assert oracle.relative_difference(oracle.logits(model, inputs), forward) < CLOSE


@pytest.mark.parametrize(
    ("family", "auto", "lost"),
    [("bert", "AutoModelForMaskedLM", "bert.pooler.dense"), ("deberta_v2", "AutoModel", "pooler.dense")],
)
def test_classifier_with_a_part_that_was_never_saved_is_refused(
    family: str, auto: str, lost: str, tmp_path: Path
) -> None:
    """The masked model has no pooler: it was random in training, frozen, and is in neither folder."""
    base = _for_classification(make_family(tmp_path / "base", family, auto=auto))
    adapter = oracle.make_adapter(tmp_path / "adapter", base, task="SEQ_CLS")
    ran = run("merge-lora", adapter, tmp_path / "out", "--base", base.path)
    assert ran.code == 3
    assert "never saved" in ran.text
    assert lost in ran.text
    assert not (tmp_path / "out").exists()

    whole = oracle.make_adapter(tmp_path / "whole", base, task="SEQ_CLS", modules_to_save=["classifier", "pooler"])
    merged(whole, tmp_path / "out", "--base", base.path, "--numerics", "peft")
    oracle.same_bits(oracle.read_tensors(tmp_path / "out"), oracle.peft_merge(base, whole, task="SEQ_CLS", labels=1))


def test_image_classifier_over_a_bare_vision_model(tmp_path: Path) -> None:
    base = make_family(tmp_path / "base", "vit", auto="AutoModel")
    adapter = oracle.make_adapter(tmp_path / "adapter", base, modules_to_save=["classifier"])
    merged(adapter, tmp_path / "out", "--base", base.path, "--numerics", "peft")
    oracle.same_bits(oracle.read_tensors(tmp_path / "out"), oracle.peft_merge(base, adapter))
    model = oracle.load_output(tmp_path / "out", base.auto)
    inputs = inputs_for(base)
    forward = oracle.peft_logits(base, adapter, inputs=inputs)
    assert oracle.relative_difference(oracle.logits(model, inputs), forward) < CLOSE
    assert oracle.read_config(tmp_path / "out")["architectures"] == ["ViTForImageClassification"]


@pytest.mark.slow
def test_reward_adapter_over_a_vision_language_model(tmp_path: Path) -> None:
    """`AutoModelForSequenceClassification` takes no pad token here, so the model is wrapped by hand."""
    import peft
    import transformers

    base = make_family(tmp_path / "base", "gemma3", change=tie)
    with quiet():
        load = transformers.AutoModelForSequenceClassification.from_pretrained
        torch.manual_seed(0)
        model = peft.get_peft_model(
            load(base.path, num_labels=1),
            peft.LoraConfig(task_type="SEQ_CLS", r=3, lora_alpha=5, target_modules=r".*language_model.*\.q_proj"),
        )
        for name, value in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(value, std=0.1)
        model.save_pretrained(tmp_path / "adapter")
        merged(tmp_path / "adapter", tmp_path / "out", "--base", base.path, "--numerics", "peft")
        found = oracle.load_output(tmp_path / "out", CLASSIFIER)
        assert type(found).__name__ == "Gemma3ForSequenceClassification"
        inputs = inputs_for(base)
        forward = oracle.logits(model.eval(), inputs)
    assert not any("lm_head" in name for name in oracle.read_tensors(tmp_path / "out"))
    assert oracle.relative_difference(oracle.logits(found, inputs), forward) < CLOSE


def test_head_of_another_shape_than_the_bases_is_refused(tmp_path: Path) -> None:
    base = _for_classification(make_family(tmp_path / "base", "phi3"))
    three = oracle.make_adapter(tmp_path / "three", base, task="SEQ_CLS", labels=3)
    two = oracle.make_adapter(tmp_path / "two", base, task="SEQ_CLS", labels=2)
    merged(two, tmp_path / "reward", "--base", base.path)
    ran = run("merge-lora", three, tmp_path / "out", "--base", tmp_path / "reward")
    assert ran.code == 3
    assert "score.weight" in ran.text
