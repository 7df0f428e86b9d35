"""Tiny models of transformers, and their weights as megatron-core's modules hold them. Needs torch and transformers.

Written loop by loop from what the modules of both compute; `save.py` checks it by comparing logits of the two models.
Nothing of rlhf-convert takes part.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from typing import Any

import torch

VOCABULARY, PADDED = 99, 112
LAYERS = 2

_SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": False,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "rms_norm_eps": 1e-6,
}  # fmt: skip
KEY_HEADS, VALUE_HEADS, KEY_HEAD, VALUE_HEAD = 2, 4, 4, 6
_KEYS, _VALUES = KEY_HEADS * KEY_HEAD, VALUE_HEADS * VALUE_HEAD
PARTS = (_KEYS, _KEYS, _VALUES, _VALUES, VALUE_HEADS, VALUE_HEADS)
"""Rows of `in_proj`: queries, keys, values, gates, beta, alpha; the first three are the channels of `conv1d`."""
FIELDS: dict[str, Any] = {
    "linear_num_key_heads": KEY_HEADS, "linear_num_value_heads": VALUE_HEADS, "linear_key_head_dim": KEY_HEAD,
    "linear_value_head_dim": VALUE_HEAD, "linear_conv_kernel_dim": 4,
}  # fmt: skip
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "norm_topk_prob": True}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {**_SIZES, "model_type": "llama"},
    "mistral": {**_SIZES, "model_type": "mistral", "sliding_window": None, "head_dim": 8},
    "qwen2": {**_SIZES, "model_type": "qwen2"},
    "qwen2-tied": {**_SIZES, "model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {**_SIZES, "model_type": "qwen3", "head_dim": 8},
    "qwen3-tied": {**_SIZES, "model_type": "qwen3", "head_dim": 8, "tie_word_embeddings": True},
    "mixtral": {**_SIZES, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {
        **_SIZES, **_EXPERTS, "model_type": "qwen2_moe", "shared_expert_intermediate_size": 20,
        "decoder_sparse_step": 1, "norm_topk_prob": False,
    },
    "qwen3_moe": {**_SIZES, **_EXPERTS, "model_type": "qwen3_moe", "head_dim": 8, "decoder_sparse_step": 1},
    "deepseek_v3": {
        **_SIZES, "model_type": "deepseek_v3", "num_key_value_heads": 4, "q_lora_rank": 12, "kv_lora_rank": 8,
        "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8, "n_routed_experts": 4, "n_shared_experts": 1,
        "num_experts_per_tok": 2, "moe_intermediate_size": 12, "first_k_dense_replace": 1, "n_group": 1,
        "topk_group": 1, "rope_interleave": True, "num_nextn_predict_layers": 0,
    },
    "deepseek_v2": {
        **_SIZES, "model_type": "deepseek_v2", "num_key_value_heads": 4, "q_lora_rank": None, "kv_lora_rank": 8,
        "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8, "n_routed_experts": 4, "n_shared_experts": 2,
        "num_experts_per_tok": 2, "moe_intermediate_size": 12, "first_k_dense_replace": 1, "n_group": 1,
        "topk_group": 1, "topk_method": "greedy",
    },
    "gpt_oss": {
        **_SIZES, "model_type": "gpt_oss", "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2,
        "attention_bias": True, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "glm4_moe": {
        **_SIZES, **_EXPERTS, "model_type": "glm4_moe", "head_dim": 8, "n_routed_experts": 4, "n_shared_experts": 1,
        "first_k_dense_replace": 1, "attention_bias": True, "use_qk_norm": True, "partial_rotary_factor": 0.5,
        "n_group": 1, "topk_group": 1, "num_nextn_predict_layers": 0,
    },
    "qwen3_next": {
        **_SIZES, **_EXPERTS, **FIELDS, "model_type": "qwen3_next", "head_dim": 8, "decoder_sparse_step": 1,
        "shared_expert_intermediate_size": 20, "partial_rotary_factor": 0.5,
        "layer_types": ["linear_attention", "full_attention"], "mlp_only_layers": [],
    },
}  # fmt: skip

GEMMA: dict[str, dict[str, Any]] = {
    name: {**_SIZES, "model_type": name, "head_dim": 8, "tie_word_embeddings": True}
    for name in ("gemma", "gemma2", "gemma3_text")
}
"""Models whose norms multiply by 1 + w, which local specs can't build; see `fused.py`."""


for _name, _of in (("deepseek_v3-mtp", "deepseek_v3"), ("glm4_moe-mtp", "glm4_moe")):
    MODELS[_name] = {**MODELS[_of], "num_nextn_predict_layers": 1}


def next_tokens(name: str, *, layers: int = LAYERS) -> dict[str, torch.Tensor]:
    """A layer for multi-token prediction as models are published with it: the last of one that has a layer more."""
    held = built(name.removesuffix("-mtp"), layers=layers + 1)
    stem, width = f"model.layers.{layers}.", held.config.hidden_size
    found = {n: t for n, t in held.state_dict().items() if n.startswith(stem) and ".experts." not in n}
    for which, both in (("gate", 0), ("up", 1)):
        wide = held.state_dict()[f"{stem}mlp.experts.gate_up_proj"]
        for expert in range(wide.shape[0]):
            found[f"{stem}mlp.experts.{expert}.{which}_proj.weight"] = wide[expert].chunk(2)[both].contiguous()
            down = held.state_dict()[f"{stem}mlp.experts.down_proj"][expert].contiguous()
            found[f"{stem}mlp.experts.{expert}.down_proj.weight"] = down
    generator = torch.Generator().manual_seed(21)
    for leaf, shape in {
        "enorm": (width,), "hnorm": (width,), "shared_head.norm": (width,), "eh_proj": (width, 2 * width),
    }.items():  # fmt: skip
        found[f"{stem}{leaf}.weight"] = torch.randn(shape, generator=generator)
    return found


def built(name: str, *, layers: int = LAYERS, vocabulary: int = VOCABULARY) -> Any:
    """The model of transformers, its weights drawn so that no two are alike, norms and biases included."""
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = {**(MODELS | GEMMA)[name], "num_hidden_layers": layers, "vocab_size": vocabulary}
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    torch.manual_seed(11)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    config.architectures = [type(model).__name__]
    generator = torch.Generator().manual_seed(12)
    for parameter in (*model.parameters(), *(b for n, b in model.named_buffers() if "correction_bias" in n)):
        around = 1.0 if parameter.ndim == 1 else 0.0
        parameter.data = (around + 0.2 * torch.randn(parameter.shape, generator=generator)).bfloat16().float()
    return model.eval()


def transformer_config(config: Any, asked: argparse.Namespace) -> Any:
    """Megatron's config for a model of transformers."""
    from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
    from torch.nn.functional import silu

    from ranks import expert_tp

    kind = config.model_type
    fields: dict[str, Any] = {
        "num_layers": config.num_hidden_layers, "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads, "num_query_groups": config.num_key_value_heads,
        "kv_channels": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        "ffn_hidden_size": config.intermediate_size, "gated_linear_unit": True, "activation_func": silu,
        "normalization": "RMSNorm", "layernorm_epsilon": config.rms_norm_eps, "add_bias_linear": False,
        "add_qkv_bias": kind in ("qwen2", "qwen2_moe", "glm4_moe"),
        "qk_layernorm": kind in ("qwen3", "qwen3_moe", "deepseek_v3", "deepseek_v2", "glm4_moe", "gemma3_text"),
        "attention_dropout": 0.0, "hidden_dropout": 0.0, "bias_activation_fusion": False,
        "masked_softmax_fusion": False, "bias_dropout_fusion": False, "apply_rope_fusion": False,
        "use_cpu_initialization": True, "tensor_model_parallel_size": asked.tp,
        "pipeline_model_parallel_size": asked.pp, "virtual_pipeline_model_parallel_size": asked.vpp,
        "expert_model_parallel_size": asked.ep, "expert_tensor_parallel_size": expert_tp(asked),
        "num_layers_in_first_pipeline_stage": asked.first_stage,
        "gradient_accumulation_fusion": False, "pipeline_dtype": __import__("torch").float32,
        "hetereogenous_dist_checkpoint": asked.per_layer, "layernorm_zero_centered_gamma": kind in GEMMA,
    }  # fmt: skip
    if getattr(config, "num_nextn_predict_layers", 0):
        fields["mtp_num_layers"] = config.num_nextn_predict_layers
    latent = hasattr(config, "kv_lora_rank")
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    experts = getattr(config, "n_routed_experts", None) or experts
    if experts:
        dense = getattr(config, "first_k_dense_replace", 0)
        width = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
        fields |= {
            "num_moe_experts": experts, "moe_router_topk": config.num_experts_per_tok, "moe_ffn_hidden_size": width,
            "moe_layer_freq": [int(n >= dense) for n in range(config.num_hidden_layers)] if dense else 1,
            "moe_router_pre_softmax": kind == "qwen2_moe", "moe_token_dispatcher_type": "allgather",
            "moe_grouped_gemm": False, "moe_router_load_balancing_type": "none",
            "moe_router_score_function": "sigmoid" if kind in ("deepseek_v3", "glm4_moe") else "softmax",
            "moe_router_enable_expert_bias": kind in ("deepseek_v3", "glm4_moe"),
        }  # fmt: skip
        shared = getattr(config, "shared_expert_intermediate_size", None)
        shared = shared or width * getattr(config, "n_shared_experts", 0) or None
        fields |= {"moe_shared_expert_intermediate_size": shared}
        if kind == "qwen2_moe":
            fields["moe_shared_expert_gate"] = True
    if kind == "qwen3_next":
        fields |= _of_delta_net(config)
    if kind == "gpt_oss":
        from megatron.core.fusions.fused_bias_geglu import quick_gelu

        fields |= {
            "add_bias_linear": True, "add_qkv_bias": True, "activation_func": quick_gelu, "glu_linear_offset": 1.0,
            "activation_func_clamp_value": 7.0, "softmax_type": "learnable",
        }  # fmt: skip
    if not latent:
        return TransformerConfig(**fields)
    fields |= {
        "q_lora_rank": config.q_lora_rank, "kv_lora_rank": config.kv_lora_rank, "qk_head_dim": config.qk_nope_head_dim,
        "qk_pos_emb_head_dim": config.qk_rope_head_dim, "v_head_dim": config.v_head_dim, "rope_type": "rope",
    }  # fmt: skip
    return MLATransformerConfig(multi_latent_attention=True, **fields)


def _of_delta_net(config: Any) -> dict[str, Any]:
    """Fields of megatron-core's config for gated delta nets and queries with gates."""
    return {name: getattr(config, name) for name in FIELDS} | {
        "layernorm_zero_centered_gamma": True, "attention_output_gate": True, "qk_layernorm": True,
        "experimental_attention_variant": "gated_delta_net", "deterministic_mode": True,
        "linear_attention_freq": [int(kind == "linear_attention") for kind in config.layer_types],
        "moe_shared_expert_gate": True,
    }  # fmt: skip


def in_megatron(hf: Mapping[str, torch.Tensor], config: Any) -> dict[str, torch.Tensor]:
    """Whole tensors by the names of megatron-core's modules (local specs), layers by their global numbers."""
    found = {"embedding.word_embeddings.weight": _padded(hf["model.embed_tokens.weight"])}
    found["decoder.final_layernorm.weight"] = hf["model.norm.weight"]
    if "lm_head.weight" in hf:
        found["output_layer.weight"] = _padded(hf["lm_head.weight"])
    for number in range(config.num_hidden_layers):
        start = f"model.layers.{number}."
        layer = {n.removeprefix(start): t for n, t in hf.items() if n.startswith(start)}
        for name, tensor in _layer(layer, config):
            found[f"decoder.layers.{number}.{name}"] = tensor
    last = config.num_hidden_layers
    after = {n.removeprefix(f"model.layers.{last}."): t for n, t in hf.items() if n.startswith(f"model.layers.{last}.")}
    if after:
        for leaf, theirs in _NEXT_TOKENS.items():
            found[f"mtp.layers.0.{leaf}.weight"] = after[f"{theirs}.weight"]
        for name, tensor in _layer(after, config):
            found[f"mtp.layers.0.transformer_layer.{name}"] = tensor
    return found


_NEXT_TOKENS = {"enorm": "enorm", "hnorm": "hnorm", "eh_proj": "eh_proj", "final_layernorm": "shared_head.norm"}


def _padded(rows: torch.Tensor) -> torch.Tensor:
    """Rows that no token has: noise, as what pads a trained vocabulary is not zero for certain."""
    noise = torch.randn(PADDED - rows.shape[0], rows.shape[1], generator=torch.Generator().manual_seed(3))
    return torch.cat([rows, noise.to(rows.dtype)])


def _layer(layer: Mapping[str, torch.Tensor], config: Any) -> Iterator[tuple[str, torch.Tensor]]:
    yield "input_layernorm.weight", layer["input_layernorm.weight"]
    if "pre_feedforward_layernorm.weight" in layer:
        yield "self_attention.linear_proj.post_layernorm.weight", layer["post_attention_layernorm.weight"]
        yield "mlp.linear_fc1.layer_norm_weight", layer["pre_feedforward_layernorm.weight"]
        yield "mlp.linear_fc2.post_layernorm.weight", layer["post_feedforward_layernorm.weight"]
    else:
        yield "pre_mlp_layernorm.weight", layer["post_attention_layernorm.weight"]
    if "linear_attn.A_log" in layer:
        yield from _linear_attention(layer)
    else:
        yield "self_attention.linear_proj.weight", layer["self_attn.o_proj.weight"]
    if "self_attn.sinks" in layer:
        yield "self_attention.linear_proj.bias", layer["self_attn.o_proj.bias"]
        yield "self_attention.core_attention.softmax_offset", layer["self_attn.sinks"]
        yield from _turned_experts(layer)
    if "self_attn.kv_a_proj_with_mqa.weight" in layer:
        yield from _latent(layer)
    elif "self_attn.q_proj.weight" in layer:
        yield from _grouped(layer, config)
    yield from _mlp("mlp", "mlp", layer)
    yield from _experts(layer)


def _latent(layer: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    names = {
        "q_proj": "linear_q_proj", "q_a_proj": "linear_q_down_proj", "q_b_proj": "linear_q_up_proj",
        "kv_a_proj_with_mqa": "linear_kv_down_proj", "kv_b_proj": "linear_kv_up_proj",
        "q_a_layernorm": "q_layernorm", "kv_a_layernorm": "kv_layernorm",
    }  # fmt: skip
    for theirs, ours in names.items():
        if f"self_attn.{theirs}.weight" in layer:
            yield f"self_attention.{ours}.weight", layer[f"self_attn.{theirs}.weight"]


def _grouped(layer: Mapping[str, torch.Tensor], config: Any) -> Iterator[tuple[str, torch.Tensor]]:
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    each = heads // groups
    for leaf in ("weight", "bias"):
        if f"self_attn.q_proj.{leaf}" not in layer:
            continue
        q, k, v = (layer[f"self_attn.{p}_proj.{leaf}"] for p in "qkv")
        parts = []
        if q.shape[0] == 2 * heads * size:
            q, each = torch.cat(_gated(q, heads, groups, size)), 2 * (heads // groups)
        for group in range(groups):
            parts += [q[(group * each + head) * size : (group * each + head + 1) * size] for head in range(each)]
            parts += [k[group * size : (group + 1) * size], v[group * size : (group + 1) * size]]
        yield f"self_attention.linear_qkv.{leaf}", torch.cat(parts)
    for which in "qk":
        if f"self_attn.{which}_norm.weight" in layer:
            yield f"self_attention.{which}_layernorm.weight", layer[f"self_attn.{which}_norm.weight"]


def _linear_attention(layer: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """One layer's tensors, by the names of megatron-core's modules."""
    mixed, rates = layer["linear_attn.in_proj_qkvz.weight"], layer["linear_attn.in_proj_ba.weight"]
    many = VALUE_HEADS // KEY_HEADS
    found: list[list[torch.Tensor]] = [[] for _ in PARTS]
    for head in range(KEY_HEADS):
        step = 2 * KEY_HEAD + 2 * many * VALUE_HEAD
        at = head * step
        for part, rows in enumerate((KEY_HEAD, KEY_HEAD, many * VALUE_HEAD, many * VALUE_HEAD)):
            found[part].append(mixed[at : at + rows])
            at += rows
        found[4].append(rates[head * 2 * many : head * 2 * many + many])
        found[5].append(rates[head * 2 * many + many : (head + 1) * 2 * many])
    yield "self_attention.in_proj.weight", torch.cat([row for part in found for row in part])
    for leaf in ("conv1d.weight", "A_log", "dt_bias", "out_proj.weight"):
        yield f"self_attention.{leaf}", layer[f"linear_attn.{leaf}"]
    norm = layer["linear_attn.norm.weight"]
    less = norm - 1
    assert torch.equal(less + 1, norm), "the norm can't be told from what Megatron has of it"
    yield "self_attention.out_norm.weight", less


def _gated(query: torch.Tensor, heads: int, groups: int, size: int) -> list[torch.Tensor]:
    """Rows of each group: its queries, then its gates, of a projection that has each head's queries and gate."""
    each = query.reshape(heads, 2, size, -1)
    many = heads // groups
    return [
        torch.cat([*each[g * many : (g + 1) * many, 0], *each[g * many : (g + 1) * many, 1]]) for g in range(groups)
    ]


def _mlp(ours: str, theirs: str, layer: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    gate, up, down = (f"{theirs}.{n}_proj.weight" for n in ("gate", "up", "down"))
    if theirs.startswith("block_sparse_moe."):
        gate, up, down = (f"{theirs}.{n}.weight" for n in ("w1", "w3", "w2"))
    if gate in layer:
        yield f"{ours}.linear_fc1.weight", torch.cat([layer[gate], layer[up]])
        yield f"{ours}.linear_fc2.weight", layer[down]


def _experts(layer: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    root = "block_sparse_moe" if "block_sparse_moe.gate.weight" in layer else "mlp"
    if f"{root}.gate.weight" not in layer:
        return
    yield "mlp.router.weight", layer[f"{root}.gate.weight"]
    if "mlp.gate.e_score_correction_bias" in layer:
        yield "mlp.router.expert_bias", layer["mlp.gate.e_score_correction_bias"]
    expert = 0
    while found := dict(_mlp(f"mlp.experts.local_experts.{expert}", f"{root}.experts.{expert}", layer)):
        yield from found.items()
        expert += 1
    for theirs in ("shared_expert", "shared_experts"):
        yield from _mlp("mlp.shared_experts", f"mlp.{theirs}", layer)
    if "mlp.shared_expert_gate.weight" in layer:
        yield "mlp.shared_experts.gate_weight", layer["mlp.shared_expert_gate.weight"]


def _turned_experts(layer: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Experts of gpt-oss: `[in, out]` for transformers, columns of gate and up by turns."""
    for leaf in ("weight", "bias"):
        yield f"mlp.router.{leaf}", layer[f"mlp.router.{leaf}"]
    for expert in range(layer["mlp.router.bias"].shape[0]):
        wide, bias = layer["mlp.experts.gate_up_proj"][expert], layer["mlp.experts.gate_up_proj_bias"][expert]
        stem = f"mlp.experts.local_experts.{expert}."
        yield stem + "linear_fc1.weight", torch.cat([wide[:, ::2].T, wide[:, 1::2].T])
        yield stem + "linear_fc1.bias", torch.cat([bias[::2], bias[1::2]])
        yield stem + "linear_fc2.weight", layer["mlp.experts.down_proj"][expert].T.contiguous()
        yield stem + "linear_fc2.bias", layer["mlp.experts.down_proj_bias"][expert]
