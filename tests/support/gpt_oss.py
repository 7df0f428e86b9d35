"""A small gpt-oss in MXFP4, and what transformers' own dequantiser makes of quantised folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from oracle.bases import edit_config, quiet, read_tensors, write_tensors


def small_gpt_oss(path: Path) -> dict[str, torch.Tensor]:
    """gpt-oss in MXFP4, its experts drawn as blocks and scales."""
    settings = transformers.GptOssConfig(
        hidden_size=64, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, num_local_experts=3, num_experts_per_tok=2, vocab_size=120, max_position_embeddings=64,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(3)
    with quiet():
        model = transformers.AutoModelForCausalLM.from_config(settings, dtype=torch.bfloat16)
        model.save_pretrained(path)
    tensors = {}
    for name, value in read_tensors(path).items():
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, inner, rows = value.shape
            codes = torch.randint(0, 256, (experts, rows, inner // 32, 16), generator=generator, dtype=torch.uint8)
            scales = torch.randint(118, 124, codes.shape[:-1], generator=generator, dtype=torch.uint8)
            tensors |= {f"{name}_blocks": codes, f"{name}_scales": scales}
        else:
            tensors[name] = torch.randn(value.shape, generator=generator).mul(0.1).to(value.dtype)
    write_tensors(path, tensors)
    edit_config(path, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    return tensors


def as_transformers_loads(folder: Path, config: Any) -> dict[str, torch.Tensor]:
    with quiet():
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=config, dtype=torch.bfloat16
        )
    return {n: p.detach() for n, p in model.state_dict().items()}
