"""A head of which a part was lost is refused: its bias does not become one that never was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    LlamaConfig,
    LlamaForTokenClassification,
    Qwen2Config,
    Qwen2ForTokenClassification,
    Qwen3Config,
    Qwen3ForTokenClassification,
)

from oracle.command import run

SMALL = {"vocab_size": 24, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 20}
MODELS: dict[str, Any] = {
    "llama": lambda: LlamaForTokenClassification(LlamaConfig(**SMALL, num_labels=1)),
    "qwen2": lambda: Qwen2ForTokenClassification(Qwen2Config(**SMALL, num_labels=1, num_key_value_heads=2)),
    "qwen3": lambda: Qwen3ForTokenClassification(Qwen3Config(**SMALL, num_labels=1, head_dim=8, num_key_value_heads=2)),
}


@pytest.mark.parametrize("to", [("trl", "reward"), ("verl", "critic"), ("openrlhf", "critic")])
@pytest.mark.parametrize("family", MODELS)
def test_a_bias_that_was_lost_is_not_left_out(family: str, to: tuple[str, str], tmp_path: Path) -> None:
    torch.manual_seed(1)
    source, out = tmp_path / "model", tmp_path / "out"
    MODELS[family]().save_pretrained(source)
    file = source / "model.safetensors"
    tensors = load_file(file)
    tensors["score.bias"] += 1.5
    save_file(tensors, file, {"format": "pt"})
    wanted = ("--to", to[0], "--role", to[1])
    dropped = ("--bias", "drop") if to[0] != "verl" else ()
    assert run("convert", source, tmp_path / "whole", *wanted, *dropped).code == 0
    del tensors["score.bias"]
    save_file(tensors, file, {"format": "pt"})
    for more in ((), dropped):
        ran = run("convert", source, out, *wanted, *more)
        assert (ran.code, "REFUSED tensors-missing" in ran.err, "score.bias" in ran.err) == (3, True, True), ran.text
        assert not out.exists()
    assert run("convert", source, out, *wanted, "--allow", "tensors-missing").code == 0
