"""LoRA on parameters of three dimensions that are no experts: a token, a table of positions, a query."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

import converter

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning", "ignore::FutureWarning")

SIZES: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48, "image_size": 16,
}  # fmt: skip
CLASSES: dict[str, tuple[Any, dict[str, Any], list[str]]] = {
    "vivit": (
        transformers.VivitForVideoClassification,
        SIZES | {"num_frames": 4, "tubelet_size": [2, 8, 8], "num_labels": 3},
        ["vivit.embeddings.cls_token", "vivit.embeddings.position_embeddings"],
    ),
    "vit": (transformers.ViTForImageClassification, SIZES | {"patch_size": 8}, ["embeddings.position_embeddings"]),
    "pixio": (transformers.PixioModel, SIZES | {"patch_size": 8}, ["cls_token"]),
}


@pytest.mark.parametrize("name", CLASSES)
def test_factors_of_a_bare_parameter_are_merged_to_pefts_bits(name: str, tmp_path: Path) -> None:
    kind, settings, targets = CLASSES[name]
    generator = torch.Generator().manual_seed(0)
    model = kind(kind.config_class(**settings))
    for value in model.parameters():
        value.data = torch.randn(value.shape, generator=generator) / 4
    model.save_pretrained(tmp_path / "base")
    live = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=[], target_parameters=targets))
    for value in live.parameters():
        value.data = torch.randn(value.shape, generator=generator) / 3 if value.requires_grad else value.data
    live.save_pretrained(tmp_path / "adapter")
    live.merge_and_unload().save_pretrained(tmp_path / "expected")

    converter.merge_lora(tmp_path / "adapter", tmp_path / "out", base=tmp_path / "base", numerics="peft")
    found, expected, base = (load_file(tmp_path / f / "model.safetensors") for f in ("out", "expected", "base"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[n], expected[n]) for n in expected)
    assert sum(not torch.equal(found[n], base[n]) for n in base) == len(targets)
