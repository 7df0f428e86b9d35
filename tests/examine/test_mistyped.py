"""A weight of integers is an error wherever nothing of its own says what it stands for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

from converter.recipe.verbs.doctor import doctor

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 32}
CLASSES = {
    "llama": (LlamaForCausalLM, LlamaConfig),
    "mistral": (MistralForCausalLM, MistralConfig),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config),
}
WEIGHT = "model.layers.1.mlp.up_proj.weight"
ELSEWHERE = {"model.layers.0.layer_scale.scale", "model.hc_attn_scale", f"{WEIGHT}_integer"}
"""Names with the word that have nothing to do with quantisation, as DeepSeek-V4's and Moshi's, and I-BERT's buffer."""


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sound")
    for name, (model, config) in CLASSES.items():
        model(config(**SIZES, num_key_value_heads=2)).save_pretrained(root / name)
    return root


def codes(sound: Path, family: str, folder: Path, more: set[str], config: dict[str, object]) -> set[str]:
    """What doctor says once one weight is of integers, and these tensors and keys are there."""
    shutil.copytree(sound / family, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[WEIGHT] = (tensors[WEIGHT] * 100).to(torch.int8)
    save_file(tensors | {n: torch.ones(1) for n in more}, folder / "model.safetensors", metadata={"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return {f.code for f in doctor(folder).findings}


@pytest.mark.parametrize("family", CLASSES)
@pytest.mark.parametrize("config", [{}, {"audio_config": {"num_quantizers": 8}}, {"vector_quantization_dim": 4}])
def test_scales_and_quantizers_of_something_else_excuse_nothing(
    sound: Path, family: str, config: dict[str, object], tmp_path: Path
) -> None:
    assert "tensors-mistyped" in codes(sound, family, tmp_path / "m", ELSEWHERE, config)


@pytest.mark.parametrize("family", CLASSES)
@pytest.mark.parametrize("scale", ["weight_scale", "weight_scale_inv", "weight.absmax", "scale", "SCB"])
def test_a_scale_of_its_own_says_what_a_weight_stands_for(sound: Path, family: str, scale: str, tmp_path: Path) -> None:
    own = WEIGHT.removesuffix("weight") + scale
    assert "tensors-mistyped" not in codes(sound, family, tmp_path / "m", {own}, {})
