"""`converter.load` says so where its input was changed while the model was filled."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

import converter
from converter.core.writer.reporter import Silent

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 32}


class Touches(Silent):
    """Somebody else writes to the file after the first tensor."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def advance(self, count: int, tensor: str) -> None:
        os.utime(self.file, ns=(1, 1))


def test_an_input_that_changes_while_it_is_loaded_is_refused(tmp_path: Path) -> None:
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(tmp_path / "model")
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    with pytest.raises(converter.Refused) as caught:
        converter.load(tmp_path / "model", model, reporter=Touches(tmp_path / "model" / "model.safetensors"))
    assert caught.value.code == "input-changed"
    converter.load(tmp_path / "model", model)
