"""Small models to break, and what doctor says of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from converter.examine.doctor import DoctorRequest, examine
from places import RUNS

HIDDEN = 16
WEIGHTS = "model.safetensors"
SIZES: dict[str, Any] = {
    "hidden_size": HIDDEN, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "vocab_size": 32, "pad_token_id": 0,
}  # fmt: skip

RUN = RUNS / "repair" / "runs"


def codes(folder: Path, **asked: Any) -> dict[str, str]:
    return {f.code: f.severity for f in examine(DoctorRequest(str(folder), **asked)).findings}


def finding(folder: Path, code: str, **asked: Any) -> Any:
    return next(f for f in examine(DoctorRequest(str(folder), **asked)).findings if f.code == code)


def serious(found: dict[str, str]) -> set[str]:
    return {c for c, s in found.items() if s != "cosmetic"}


def edit(folder: Path, name: str = "config.json", drop: tuple[str, ...] = (), **changes: Any) -> None:
    value = json.loads((folder / name).read_text()) | changes
    (folder / name).write_text(json.dumps({k: v for k, v in value.items() if k not in drop}))


def store(folder: Path, change: Any, name: str = WEIGHTS) -> None:
    save_file(change(load_file(folder / name)), folder / name, metadata={"format": "pt"})


@pytest.fixture
def reward(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    LlamaForSequenceClassification(LlamaConfig(**SIZES, num_labels=1)).save_pretrained(tmp_path / "rm")
    return tmp_path / "rm"


@pytest.fixture
def causal(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(tmp_path / "lm")
    return tmp_path / "lm"


def adapter(base: Path, out: Path, task: str = "SEQ_CLS") -> Path:
    model = LlamaForSequenceClassification.from_pretrained(base, num_labels=1)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type=task))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    wrapped.save_pretrained(out)
    edit(out, "adapter_config.json", base_model_name_or_path=str(base))
    return out


def value_head(folder: Path, name: str = "value_head.safetensors") -> None:
    """As LLaMA-Factory's callback writes it beside a model or an adapter."""
    head = {"v_head.summary.weight": torch.randn(1, HIDDEN), "v_head.summary.bias": torch.zeros(1)}
    if name.endswith(".bin"):
        torch.save(head, folder / name)
    else:
        save_file(head, folder / name, metadata={"format": "pt"})
