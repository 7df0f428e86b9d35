"""The class that `architectures` names in what is written, as each trainer's own saving code writes it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import heads_zoo as zoo
from converter.core.context import Context
from heads_run import opened, remapped

CLASSES = {
    ("openrlhf", "reward"): "RewardModel",
    ("openrlhf", "critic"): "CriticModel",
    ("openrlhf@0.5.2", "critic"): "CriticModel",
    ("skyrl", "critic"): "CriticModel",
    ("trl", "reward"): "LlamaForSequenceClassification",
    ("vllm", "reward"): "LlamaForSequenceClassification",
    ("verl", "critic"): "LlamaForTokenClassification",
    ("areal", "critic"): "LlamaForTokenClassification",
    ("llamafactory", "reward"): "LlamaForCausalLM",
    ("trl-valuehead", "critic"): "LlamaForCausalLM",
}


@pytest.mark.parametrize(("trainer", "role"), CLASSES)
def test_a_model_for_a_trainer_names_its_class(trainer: str, role: str, tmp_path: Path) -> None:
    source = zoo.save(zoo.FORMS["hf-seqcls"], zoo.live("llama", torch.float32), tmp_path / "rm")
    context = Context(allow=frozenset({"lm-head-missing"}))
    assert remapped(opened(source), trainer, context, role=role).config["architectures"] == [CLASSES[trainer, role]]
