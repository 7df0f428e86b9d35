"""Tiny models of transformers 5 whose rotary embeddings differ from the defaults, and what they say of some tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

ALL_HEADS: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": [2, 3], "max_position_embeddings": 256,
}  # fmt: skip
BASE: dict[str, Any] = {**ALL_HEADS, "num_key_value_heads": 2}
TOKENS = (torch.arange(40) * 7 % 61 + 3)[None]


def rope(kind: str = "default", theta: float = 500000.0, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **more}}


def layers(full: dict[str, Any], theta: float) -> dict[str, Any]:
    sliding = {"rope_type": "default", "rope_theta": theta}
    return {"rope_parameters": {"full_attention": full, "sliding_attention": sliding}}


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
VISION = {"depth": 1, "hidden_size": 32, "num_heads": 2}
PART = {"partial_rotary_factor": 0.5}
YARN = {"factor": 4.0, "original_max_position_embeddings": 64}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {**BASE, **rope()}),
    "llama3": (
        "LlamaConfig",
        {**BASE, **rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                        original_max_position_embeddings=32)},
    ),
    "yarn": ("Qwen2Config", {**BASE, **rope("yarn", **YARN)}),
    "linear": ("LlamaConfig", {**BASE, **rope("linear", 20000.0, factor=2.0)}),
    "dynamic": ("LlamaConfig", {**BASE, **rope("dynamic", 20000.0, factor=2.0)}),
    "qwen3": ("Qwen3Config", {**BASE, **rope(), "head_dim": 8}),
    "mistral": ("MistralConfig", {**BASE, **rope()}),
    "mixtral": ("MixtralConfig", {**BASE, **rope(), "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": ("Qwen2MoeConfig", {**BASE, **rope(), **EXPERTS, "shared_expert_intermediate_size": 16}),
    "qwen3_moe": ("Qwen3MoeConfig", {**BASE, **rope(), **EXPERTS, "head_dim": 8}),
    "gemma2": ("Gemma2Config", {**BASE, **rope(), "head_dim": 8}),
    "gemma3": (
        "Gemma3TextConfig",
        {**BASE, "head_dim": 8, "sliding_window": 16, "num_hidden_layers": 6,
         **layers({"rope_type": "linear", "factor": 8.0, "rope_theta": 300000.0}, 20000.0)},
    ),
    "phi": ("PhiConfig", {**BASE, **rope(partial_rotary_factor=0.25)}),
    "phi3": ("Phi3Config", {**BASE, **rope(**PART)}),
    "stablelm": ("StableLmConfig", {**BASE, **rope(**PART)}),
    "gpt_neox": ("GPTNeoXConfig", {**ALL_HEADS, **rope(**PART)}),
    "persimmon": ("PersimmonConfig", {**ALL_HEADS, **rope(partial_rotary_factor=0.25)}),
    "glm": ("GlmConfig", {**BASE, **rope(partial_rotary_factor=1.0), "head_dim": 8}),
    "glm4": ("Glm4Config", {**BASE, **rope(partial_rotary_factor=1.0), "head_dim": 8}),
    "cohere": ("CohereConfig", {**BASE, **rope()}),
    "olmo2": ("Olmo2Config", {**BASE, **rope()}),
    "olmo3": (
        "Olmo3Config",
        {**BASE, "sliding_window": 16, "num_hidden_layers": 4,
         **layers({"rope_type": "yarn", "rope_theta": 300000.0, **YARN}, 300000.0)},
    ),
    "granite": ("GraniteConfig", {**BASE, **rope()}),
    "starcoder2": ("Starcoder2Config", {**BASE, **rope()}),
    "falcon": ("FalconConfig", {**ALL_HEADS, **rope()}),
    "nemotron": ("NemotronConfig", {**BASE, **rope(partial_rotary_factor=0.25)}),
    "smollm3": ("SmolLM3Config", {**BASE, **rope()}),
    "deepseek_v3": (
        "DeepseekV3Config",
        {**BASE, **rope(), "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
         "moe_intermediate_size": 16, "n_shared_experts": 1, "q_lora_rank": 8, "kv_lora_rank": 8, "topk_group": 1,
         "qk_rope_head_dim": 8, "v_head_dim": 8, "qk_nope_head_dim": 8, "first_k_dense_replace": 1},
    ),
    "modernbert": (
        "ModernBertConfig",
        {**ALL_HEADS, "num_hidden_layers": 4, "layer_types": ["full_attention", "sliding_attention"] * 2,
         "local_attention": 8, "cls_token_id": 1, "sep_token_id": 2,
         **layers({"rope_type": "default", "rope_theta": 300000.0}, 20000.0)},
    ),
    "qwen2_vl": (
        "Qwen2VLConfig",
        {"text_config": {**BASE, **rope(mrope_section=[1, 1, 2])}, "vision_config": {**VISION, "embed_dim": 32}},
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VLConfig",
        {"text_config": {**BASE, **rope(mrope_section=[1, 1, 2])},
         "vision_config": {**VISION, "out_hidden_size": 32, "intermediate_size": 32}},
    ),
    "qwen3_vl": (
        "Qwen3VLConfig",
        {"text_config": {**BASE, "head_dim": 8, **rope(mrope_section=[2, 1, 1], mrope_interleaved=True)},
         "vision_config": {**VISION, "out_hidden_size": 32, "intermediate_size": 32, "deepstack_visual_indexes": [0]}},
    ),
}  # fmt: skip


def auto_class(name: str) -> Any:
    """The auto class that loads a case, in transformers 4 and 5."""
    if "bert" in name:
        return transformers.AutoModelForMaskedLM
    return transformers.AutoModelForImageTextToText if "_vl" in name else transformers.AutoModelForCausalLM


def save(name: str, folder: Path) -> torch.Tensor:
    """Save a seeded model of that case; what it says of `TOKENS`."""
    torch.manual_seed(0)
    kind, arguments = CASES[name]
    make: Callable[..., Any] = getattr(transformers, kind)
    model = auto_class(name).from_config(make(**arguments), attn_implementation="eager").eval().float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)  # else attention hardly depends on positions
        said = model(TOKENS).logits
    model.save_pretrained(folder)
    return torch.as_tensor(said)


def load(name: str, folder: Path) -> torch.Tensor:
    """What the model in a folder says of `TOKENS`; every weight must be found.

    Raises:
        AssertionError: a weight is missing or left over.
    """
    model, told = auto_class(name).from_pretrained(folder, attn_implementation="eager", output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"], told
    with torch.no_grad():
        return torch.as_tensor(model.eval().float()(TOKENS).logits)
