"""`extract-lora` takes whole models only: what one of them lacks is not a difference of zero."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import converter

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 32}
CLASSES = {
    "llama": (LlamaForCausalLM, LlamaConfig),
    "mistral": (MistralForCausalLM, MistralConfig),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config),
}
CHANGED, HARMED = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"
HARMS: dict[str, Callable[[dict[str, torch.Tensor]], object]] = {
    "tensors-missing": lambda t: t.pop(HARMED),
    "tensors-mistyped": lambda t: t.update({HARMED: (t[HARMED] * 100).to(torch.int8)}),
}


@pytest.mark.parametrize("side", ["tuned", "base"])
@pytest.mark.parametrize("code", HARMS)
@pytest.mark.parametrize("family", CLASSES)
def test_a_model_that_is_not_whole_is_refused(family: str, code: str, side: str, tmp_path: Path) -> None:
    model, config = CLASSES[family]
    live = model(config(**SIZES, num_key_value_heads=2))
    live.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        live.get_parameter(CHANGED).add_(0.1)
    live.save_pretrained(tmp_path / "tuned")
    converter.extract_lora(tmp_path / "base", tmp_path / "tuned", tmp_path / "sound", rank=2)
    file = tmp_path / side / "model.safetensors"
    tensors = load_file(file)
    HARMS[code](tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(converter.Refused) as caught:
        converter.extract_lora(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", rank=2)
    assert caught.value.code == code
    assert not (tmp_path / "out").exists()
