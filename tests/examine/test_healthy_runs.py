"""A run's folder as transformers' own Trainer leaves it is healthy at the top and in every checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from healthy.findings import serious
from healthy.shrink import build
from oracle.bases import quiet, save_tokenizer


class Rows(torch.utils.data.Dataset[dict[str, Any]]):
    """Eight rows of tokens, with a label for each row or for each token."""

    def __init__(self, *, scored: bool) -> None:
        self.scored = scored

    def __len__(self) -> int:
        return 8

    def __getitem__(self, at: int) -> dict[str, Any]:
        tokens = torch.arange(at + 3, at + 9)
        return {"input_ids": tokens, "labels": torch.tensor(float(at)) if self.scored else tokens}


def trained(folder: Path, task: str, kind: str, lora: bool) -> None:
    """Two steps, a checkpoint after each, and the model at the end."""
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer, TrainingArguments

    with quiet():
        model = build(task, kind)
        model.save_pretrained(folder / "base")
        if lora:
            of = {"seqcls": "SEQ_CLS", "causal": "CAUSAL_LM"}[task]
            model = type(model).from_pretrained(folder / "base")
            model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type=of))
        arguments = TrainingArguments(
            str(folder / "run"), max_steps=2, save_steps=1, per_device_train_batch_size=2, learning_rate=1e-2,
            report_to=[], use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=Rows(scored=task == "seqcls"))
        trainer.train()
        trainer.save_model()
        save_tokenizer(folder / "run")


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("task", ["seqcls", "causal"])
def test_a_run_of_transformers_trainer_is_healthy(task: str, kind: str, lora: bool, tmp_path: Path) -> None:
    trained(tmp_path, task, kind, lora)
    for place in ("run", "run/checkpoint-1", "run/checkpoint-2"):
        assert serious(tmp_path / place, deep=True) == []
        assert serious(tmp_path / place) == []
    for file in (tmp_path / "run").iterdir():
        if file.is_file():
            file.unlink()
    assert serious(tmp_path / "run") == []
