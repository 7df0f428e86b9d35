"""What Megatron's training script would have been called with for a model: `args`, which its loader compares.

Only what config.json implies is in it. Source: `check_checkpoint_args` and `load_args_from_checkpoint` of
https://github.com/NVIDIA/Megatron-LM/blob/0032978/megatron/training/checkpointing.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from converter.families.megatron.formulas import Sizes
from converter.families.megatron.next_tokens import count
from converter.families.megatron.rows import ROWS, ZERO_CENTRED
from converter.families.ties import is_tied

_QKV_BIAS = "decoder.layers.{N}.self_attention.linear_qkv.bias"
_QK_NORM = "decoder.layers.{N}.self_attention.q_layernorm.weight"
_LINEAR_BIAS = "decoder.layers.{N}.self_attention.linear_proj.bias"
_SIGMOID = frozenset({"deepseek_v3", "glm4_moe"})


def arguments(
    config: Mapping[str, Any], sizes: Sizes, *, tp: int, pp: int, ep: int, etp: int, divisor: int, padded: int
) -> dict[str, Any]:
    """The arguments by name."""
    kind = str(config.get("model_type"))
    keys = {row.ours for row in ROWS[kind]}
    rope = config.get("rope_parameters") if isinstance(config.get("rope_parameters"), dict) else {}
    found: dict[str, Any] = {
        "num_layers": sizes.layers, "hidden_size": config["hidden_size"], "num_attention_heads": sizes.heads,
        "ffn_hidden_size": config.get("intermediate_size"), "group_query_attention": sizes.groups != sizes.heads,
        "num_query_groups": sizes.groups, "kv_channels": sizes.head,
        "max_position_embeddings": config.get("max_position_embeddings"),
        "seq_length": config.get("max_position_embeddings"), "position_embedding_type": "rope",
        "add_position_embedding": True, "use_rotary_position_embeddings": True, "rotary_interleaved": False,
        "rotary_base": (rope or {}).get("rope_theta", config.get("rope_theta")),
        "rotary_percent": (rope or {}).get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)),
        "normalization": "RMSNorm", "norm_epsilon": config.get("rms_norm_eps"), "swiglu": True,
        "add_bias_linear": _LINEAR_BIAS in keys, "add_qkv_bias": _QKV_BIAS in keys, "qk_layernorm": _QK_NORM in keys,
        "apply_layernorm_1p": kind in ZERO_CENTRED, "untie_embeddings_and_output_weights": not is_tied(config),
        "make_vocab_size_divisible_by": divisor, "vocab_size": sizes.vocabulary, "padded_vocab_size": padded,
        "tokenizer_type": "HuggingFaceTokenizer", "attention_dropout": 0.0, "hidden_dropout": 0.0,
        "tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp, "expert_model_parallel_size": ep,
        "expert_tensor_parallel_size": etp, "virtual_pipeline_model_parallel_size": None,
        "consumed_train_samples": 0, "consumed_valid_samples": 0, "skipped_train_samples": 0,
        "no_save_optim": True, "no_save_rng": True,
    }  # fmt: skip
    found |= _of_experts(config, sizes, kind)
    if config.get("kv_lora_rank") is not None:
        found |= {
            "multi_latent_attention": True, "qk_layernorm": True, "group_query_attention": False,
            "q_lora_rank": config.get("q_lora_rank"), "kv_lora_rank": config.get("kv_lora_rank"),
            "qk_head_dim": config.get("qk_nope_head_dim"), "qk_pos_emb_head_dim": config.get("qk_rope_head_dim"),
            "v_head_dim": config.get("v_head_dim"),
        }  # fmt: skip
    return found


def _of_experts(config: Mapping[str, Any], sizes: Sizes, kind: str) -> dict[str, Any]:
    experts = next((config[k] for k in ("n_routed_experts", "num_local_experts", "num_experts") if config.get(k)), None)
    found: dict[str, Any] = {"num_experts": experts, "mtp_num_layers": count(config) or None}
    if experts is None:
        return found
    width = config.get("moe_intermediate_size") or config.get("intermediate_size")
    dense = config.get("first_k_dense_replace") or 0
    shared = config.get("shared_expert_intermediate_size")
    if shared is None and config.get("n_shared_experts"):
        shared = width * config["n_shared_experts"]
    return found | {
        "moe_ffn_hidden_size": width, "moe_router_topk": config.get("num_experts_per_tok"),
        "moe_layer_freq": [int(n >= dense) for n in range(sizes.layers)] if dense else 1,
        "moe_shared_expert_intermediate_size": shared,
        "moe_router_score_function": "sigmoid" if kind in _SIGMOID else "softmax",
        "moe_router_enable_expert_bias": kind in _SIGMOID,
    }  # fmt: skip
