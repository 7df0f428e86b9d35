"""Small folders for the tests of `verify`, and ways to break them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForSequenceClassification

from converter.cli import main

SHAPE = {
    "vocab_size": 384,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
WEIGHT = "model.layers.1.mlp.up_proj.weight"


def randomised(model: Any, seed: int = 0) -> Any:
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            tensor.copy_(torch.randn(tensor.shape, generator=draw) * 0.3 + (1.0 if "norm" in name else 0.0))
    return model


def make_rm(folder: Path) -> Path:
    """A reward model that transformers saved."""
    randomised(LlamaForSequenceClassification(LlamaConfig(num_labels=1, **SHAPE))).save_pretrained(folder)
    return folder


def copy(folder: Path, to: Path, **config: Any) -> Path:
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    edit(to, **config)
    return to


def edit(folder: Path, **config: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))


def rewrite(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def verify(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    code = main(["verify", *arguments, "--json"])
    return code, json.loads(capsys.readouterr().out)


def codes(found: dict[str, Any], outcome: str = "fails") -> set[str]:
    return {c["code"] for c in found["checks"] if c["outcome"] == outcome}


def text_of(found: dict[str, Any], code: str) -> str:
    return " ".join(c["text"] for c in found["checks"] if c.get("code") == code)
