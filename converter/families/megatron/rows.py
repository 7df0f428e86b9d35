"""The table: what a tensor of megatron-core is called, what becomes of it, and what transformers calls the outcome.

A row holds for both ways. `{N}` is a layer, `{E}` an expert. Names are the keys of a `torch_dist` checkpoint, with
layers apart: those of modules of TransformerEngine; `others` are what modules without it, or of older versions, write
for the same tensor. Shapes: V rows of the vocabulary, h hidden, f intermediate, n heads, g groups of them, d a head's
size, e experts.

Source: `sharded_state_dict` of https://github.com/NVIDIA/Megatron-LM/blob/core_v0.16.1/megatron/core/models/gpt,
transformer/attention.py, transformer/multi_latent_attention.py, transformer/mlp.py and transformer/moe there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Formula = Literal[
    "same", "vocabulary", "qkv", "halves", "experts", "expert-halves", "stack", "stack-halves", "gated-qkv",
    "delta-projections", "delta-channels", "one-more",
]  # fmt: skip
"""`same`: as it is. `vocabulary`: without rows that no token has. `qkv`: for each group its queries, key and value.
`halves`: `[gate; up]`. `experts`: `[e, ...]`, one after the other. `expert-halves`: `halves` of each. `stack`: experts
in one tensor, each transposed. `stack-halves`: the same, columns of gate and up by turns. `gated-qkv`: for each group
its queries, as many gates, key and value. `delta-projections`: queries, keys, values, gates (z), beta and alpha of a
gated delta net. `delta-channels`: one row for each query, key and value. `one-more`: w for 1 + w."""


@dataclass(frozen=True)
class Row:
    """One tensor of Megatron, and those that it is for transformers.

    Attributes:
        ours: the key.
        theirs: names on disk; of `halves` gate and up, of `qkv` query, key and value.
        others: keys that mean the same.
        layers: the layers whose tensor is written by this row, where two rows have the same of transformers.
    """

    ours: str
    formula: Formula
    theirs: tuple[str, ...]
    others: tuple[str, ...] = ()
    layers: Literal["all", "dense", "experts"] = "all"


_OURS, _THEIRS = "decoder.layers.{N}.", "model.layers.{N}."


def _layer(ours: str, formula: Formula, *theirs: str, others: tuple[str, ...] = ()) -> Row:
    return Row(_OURS + ours, formula, tuple(_THEIRS + t for t in theirs), tuple(_OURS + o for o in others))


_ENDS = (
    Row("embedding.word_embeddings.weight", "vocabulary", ("model.embed_tokens.weight",)),
    Row("decoder.final_layernorm.weight", "same", ("model.norm.weight",)),
    Row("output_layer.weight", "vocabulary", ("lm_head.weight",)),
)
_ATTENTION = (
    _layer(
        "self_attention.linear_qkv.layer_norm_weight", "same", "input_layernorm.weight",
        others=("input_layernorm.weight",),
    ),
    _layer(
        "self_attention.linear_qkv.weight", "qkv",
        "self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight",
    ),
    _layer("self_attention.linear_proj.weight", "same", "self_attn.o_proj.weight"),
)  # fmt: skip
_QKV_BIAS = (
    _layer(
        "self_attention.linear_qkv.bias", "qkv",
        "self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias",
    ),
)  # fmt: skip
_QK_NORM = (
    _layer("self_attention.q_layernorm.weight", "same", "self_attn.q_norm.weight"),
    _layer("self_attention.k_layernorm.weight", "same", "self_attn.k_norm.weight"),
)
_BEFORE_DENSE, _BEFORE_EXPERTS = "mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"
_AFTER_ATTENTION = _layer(_BEFORE_DENSE, "same", "post_attention_layernorm.weight", others=(_BEFORE_EXPERTS,))
_MLP = (
    _AFTER_ATTENTION,
    _layer("mlp.linear_fc1.weight", "halves", "mlp.gate_proj.weight", "mlp.up_proj.weight"),
    _layer("mlp.linear_fc2.weight", "same", "mlp.down_proj.weight"),
)

_DENSE = (*_ENDS, *_ATTENTION, *_MLP)


def _experts(theirs: str, gate: str, up: str, down: str) -> tuple[Row, ...]:
    """Experts and their router, below a module of a name; `{E}` numbers them."""
    each = f"{theirs}.experts.{{E}}."
    return (
        _layer("mlp.router.weight", "same", f"{theirs}.gate.weight"),
        _layer("mlp.experts.experts.linear_fc1.weight", "expert-halves", f"{each}{gate}.weight", f"{each}{up}.weight"),
        _layer("mlp.experts.experts.linear_fc2.weight", "experts", f"{each}{down}.weight"),
    )


def _shared(theirs: str) -> tuple[Row, ...]:
    """An expert that every token goes to."""
    halves = (f"mlp.{theirs}.gate_proj.weight", f"mlp.{theirs}.up_proj.weight")
    return (
        _layer("mlp.shared_experts.linear_fc1.weight", "halves", *halves),
        _layer("mlp.shared_experts.linear_fc2.weight", "same", f"mlp.{theirs}.down_proj.weight"),
    )


_AROUND_EXPERTS = (
    dataclasses.replace(_AFTER_ATTENTION, layers="dense"),
    Row(_OURS + _BEFORE_EXPERTS, "same", _AFTER_ATTENTION.theirs, (_OURS + _BEFORE_DENSE,), layers="experts"),
)
_MOE = (*_AROUND_EXPERTS, *_experts("mlp", "gate_proj", "up_proj", "down_proj"))
_NEXT_TOKENS = (
    _layer("enorm.weight", "same", "enorm.weight"),
    _layer("hnorm.weight", "same", "hnorm.weight"),
    _layer("eh_proj.weight", "same", "eh_proj.weight"),
    _layer("final_layernorm.weight", "same", "shared_head.norm.weight"),
)
"""Of a layer for multi-token prediction, which transformers numbers after those of the model. `eh_proj` multiplies
`[embedding, hidden]` for megatron-core and for these families. Source: Megatron-Bridge 067f987,
models/deepseek/common.py; transformer/multi_token_prediction.py of megatron-core 0.13.1, 0.16.1 and 0.19.2."""
_EXPERT_BIAS = (_layer("mlp.router.expert_bias", "same", "mlp.gate.e_score_correction_bias"),)
_LATENT = (
    _layer(
        "input_layernorm.weight", "same", "input_layernorm.weight",
        others=("self_attention.linear_qkv.layer_norm_weight",),
    ),
    _layer("self_attention.linear_q_proj.weight", "same", "self_attn.q_proj.weight"),
    _layer("self_attention.linear_q_down_proj.weight", "same", "self_attn.q_a_proj.weight"),
    _layer("self_attention.linear_q_up_proj.weight", "same", "self_attn.q_b_proj.weight"),
    _layer("self_attention.linear_kv_down_proj.weight", "same", "self_attn.kv_a_proj_with_mqa.weight"),
    _layer("self_attention.linear_kv_up_proj.weight", "same", "self_attn.kv_b_proj.weight"),
    _layer(
        "self_attention.linear_q_up_proj.layer_norm_weight", "same", "self_attn.q_a_layernorm.weight",
        others=("self_attention.q_layernorm.weight",),
    ),
    _layer(
        "self_attention.linear_kv_up_proj.layer_norm_weight", "same", "self_attn.kv_a_layernorm.weight",
        others=("self_attention.kv_layernorm.weight",),
    ),
    _layer("self_attention.linear_proj.weight", "same", "self_attn.o_proj.weight"),
)  # fmt: skip
_DENSE_FIRST = _MLP[1:]
"""Layers without experts, which some mixtures begin with."""
_MIXTURE = (*_ENDS, *_ATTENTION, *_MOE)
_LATENT_MIXTURE = (*_ENDS, *_LATENT, *_MOE, *_DENSE_FIRST, *_shared("shared_experts"))

_AROUND_BLOCKS = (
    _layer("self_attention.linear_proj.post_layernorm.weight", "same", "post_attention_layernorm.weight"),
    _layer("mlp.linear_fc1.layer_norm_weight", "same", "pre_feedforward_layernorm.weight"),
    _layer("mlp.linear_fc2.post_layernorm.weight", "same", "post_feedforward_layernorm.weight"),
)
"""Norms before and behind each block. Source: Megatron-Bridge 932b713, models/gemma/gemma2_bridge.py."""

_STACKED_EXPERTS = (
    _layer("mlp.router.weight", "same", "mlp.router.weight"),
    _layer("mlp.router.bias", "same", "mlp.router.bias"),
    _layer("mlp.experts.experts.linear_fc1.weight", "stack-halves", "mlp.experts.gate_up_proj"),
    _layer("mlp.experts.experts.linear_fc1.bias", "stack-halves", "mlp.experts.gate_up_proj_bias"),
    _layer("mlp.experts.experts.linear_fc2.weight", "stack", "mlp.experts.down_proj"),
    _layer("mlp.experts.experts.linear_fc2.bias", "same", "mlp.experts.down_proj_bias"),
    _layer("self_attention.linear_proj.bias", "same", "self_attn.o_proj.bias"),
    _layer("self_attention.core_attention.softmax_offset", "same", "self_attn.sinks"),
)
"""Of gpt-oss, whose experts are one tensor `[e, in, out]` for transformers. Source: Megatron-Bridge 067f987,
models/gpt_oss/gpt_oss_bridge.py."""

_GATED_DELTA_NET = (
    _layer("self_attention.in_proj.layer_norm_weight", "same", "input_layernorm.weight"),
    _layer(
        "self_attention.in_proj.weight", "delta-projections",
        "linear_attn.in_proj_qkvz.weight", "linear_attn.in_proj_ba.weight",
    ),
    _layer("self_attention.conv1d.weight", "delta-channels", "linear_attn.conv1d.weight"),
    _layer("self_attention.A_log", "same", "linear_attn.A_log"),
    _layer("self_attention.dt_bias", "same", "linear_attn.dt_bias"),
    _layer("self_attention.out_norm.weight", "one-more", "linear_attn.norm.weight"),
    _layer("self_attention.out_proj.weight", "same", "linear_attn.out_proj.weight"),
)  # fmt: skip
"""Of layers with linear attention. A checkpoint has parts of two of them apart (see `delta_net`). Source:
ssm/gated_delta_net.py of megatron-core 0.16.1 and 0.19.2."""
_GATED_ATTENTION = (_ATTENTION[0], dataclasses.replace(_ATTENTION[1], formula="gated-qkv"), _ATTENTION[2])

ROWS: Mapping[str, tuple[Row, ...]] = {
    "llama": _DENSE,
    "mistral": _DENSE,
    "qwen2": (*_DENSE, *_QKV_BIAS),
    "qwen3": (*_DENSE, *_QK_NORM),
    "gemma": _DENSE,
    "gemma2": (*_ENDS, *_ATTENTION, *_AROUND_BLOCKS, *_MLP[1:]),
    "gemma3_text": (*_ENDS, *_ATTENTION, *_AROUND_BLOCKS, *_MLP[1:], *_QK_NORM),
    "mixtral": (*_ENDS, *_ATTENTION, *_AROUND_EXPERTS, *_experts("block_sparse_moe", "w1", "w3", "w2")),
    "qwen2_moe": (
        *_MIXTURE, *_DENSE_FIRST, *_QKV_BIAS, *_shared("shared_expert"),
        _layer("mlp.shared_experts.gate_weight", "same", "mlp.shared_expert_gate.weight"),
    ),
    "qwen3_moe": (*_MIXTURE, *_DENSE_FIRST, *_QK_NORM),
    "qwen3_next": (
        *_ENDS, *_GATED_ATTENTION, *_GATED_DELTA_NET, *_MOE, *_DENSE_FIRST, *_QK_NORM, *_shared("shared_expert"),
        _layer("mlp.shared_experts.gate_weight", "same", "mlp.shared_expert_gate.weight"),
    ),
    "deepseek_v2": _LATENT_MIXTURE,
    "deepseek_v3": (*_LATENT_MIXTURE, *_EXPERT_BIAS, *_NEXT_TOKENS),
    "gpt_oss": (*_ENDS, *_ATTENTION, *_QKV_BIAS, *_AROUND_EXPERTS, *_STACKED_EXPERTS),
    "glm4_moe": (
        *_MIXTURE, *_DENSE_FIRST, *_QKV_BIAS, *_QK_NORM, *_EXPERT_BIAS, *_shared("shared_experts"), *_NEXT_TOKENS,
    ),
}  # fmt: skip
"""Rows by `model_type`."""

NOT_WRITTEN: Mapping[str, str] = {
    "qwen3_next": "its queries have gates between them, and of one norm Megatron has w - 1, which is rounded",
}
"""Model types whose rows are read alone, with the reason."""

ZERO_CENTRED = frozenset({"gemma", "gemma2", "gemma3_text", "qwen3_next"})
"""Families whose norms multiply by 1 + w. With `layernorm_zero_centered_gamma` Megatron's do so too, and the weights
are the same; without it they would be 1 more."""

EMBEDDING, OUTPUT, OUTPUT_BIAS = "embedding.word_embeddings.weight", "output_layer.weight", "output_layer.bias"
