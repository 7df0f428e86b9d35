"""`rank_pattern` and `alpha_pattern`: the ranks and scales are those that PEFT's own rule gives."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.utils.other import get_pattern_key
from safetensors.torch import save_file

from converter.converters.merge.adapter_config import AdapterConfig, read_adapter_config
from heads_run import opened

MODULES = [
    "model.layers.1.self_attn.q_proj", "model.layers.11.self_attn.q_proj", "layers.1.q_proj", "q_proj", "xq_proj",
    "model.layers.1.mlp.up_proj", "model.layers.1.self_attn.q_proj.inner", "model.score",
]  # fmt: skip
PATTERNS = [
    "q_proj", "1.self_attn.q_proj", "layers.1.self_attn.q_proj", "proj", r".*\.1\..*", "model.layers.1.mlp.up_proj",
    "^model.layers.1.mlp.up_proj", "attn.q_proj", r"layers\.\d+\.self_attn\.q_proj", "score|q_proj", "_proj",
]  # fmt: skip


def config_of(folder: Path, **fields: Any) -> AdapterConfig:
    folder.mkdir()
    save_file({"base_model.model.q_proj.lora_A.weight": torch.zeros(1, 1)}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8} | fields))
    return read_adapter_config(opened(folder))


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("rslora", [False, True])
def test_rank_and_scale_of_a_module_are_those_of_peft_s_rule(pattern: str, rslora: bool, tmp_path: Path) -> None:
    patterns = {"rank_pattern": {pattern: 3}, "alpha_pattern": {pattern: 5}}
    config = config_of(tmp_path / "adapter", lora_alpha=12, use_rslora=rslora, **patterns)
    for module in MODULES:
        hit = get_pattern_key([pattern], module) == pattern
        rank, alpha = (3, 5) if hit else (8, 12)
        assert config.rank_of(module) == rank, module
        assert config.scale_of(module) == alpha / (math.sqrt(rank) if rslora else rank), module


def test_of_several_patterns_the_first_wins(tmp_path: Path) -> None:
    patterns = {"self_attn.q_proj": 2, "q_proj": 4}
    config = config_of(tmp_path / "adapter", lora_alpha=8, rank_pattern=patterns)
    assert [config.rank_of(m) for m in ("layers.0.self_attn.q_proj", "layers.0.q_proj", "k_proj")] == [2, 4, 8]
