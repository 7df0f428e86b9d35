"""GPTModels on CPU with the names of TransformerEngine's modules: norms inside of the matrices behind them.

Megatron's own specs for the CPU keep these norms apart, and have none that multiplies by 1 + w.
"""

from __future__ import annotations

import argparse
from typing import Any

from delta_net import Centred
from models import transformer_config


def model_chunk(config: Any, asked: argparse.Namespace) -> Any:
    """This rank's GPTModel."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    settings = transformer_config(config, asked)
    layer = get_gpt_layer_local_spec(
        settings.num_moe_experts, False, settings.qk_layernorm, False, normalization="RMSNorm"
    )
    _put_norms_inside(layer.submodules, is_around=hasattr(config, "query_pre_attn_scalar"))
    count = config.num_hidden_layers // asked.pp
    return GPTModel(
        settings, TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=RootNorm), config.vocab_size, 64,
        parallel_output=False, pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(), position_embedding_type="rope",
        share_embeddings_and_output_weights=config.tie_word_embeddings,
    )  # fmt: skip


class RootNorm(Centred):
    """A norm with one weight a column; what it computes is not asked here."""


def _put_norms_inside(parts: Any, *, is_around: bool) -> None:
    """Change a layer's spec.

    Args:
        is_around: each block has a norm behind it too.
    """
    import torch
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.identity_op import IdentityOp

    class TELayerNormColumnParallelLinear(ColumnParallelLinear):
        def __init__(self, input_size: int, output_size: int, **named: Any) -> None:
            super().__init__(input_size, output_size, **named)
            self.layer_norm_weight = torch.nn.Parameter(torch.ones(input_size))

    class TERowParallelLinearLayerNorm(RowParallelLinear):
        def __init__(self, input_size: int, output_size: int, **named: Any) -> None:
            super().__init__(input_size, output_size, **named)
            self.post_layernorm = RootNorm(None, output_size)

    parts.sharded_state_dict_keys_map = {}
    parts.input_layernorm = IdentityOp
    attention, mlp = parts.self_attention.submodules, parts.mlp.submodules
    attention.linear_qkv = TELayerNormColumnParallelLinear
    if attention.q_layernorm is not IdentityOp:
        attention.q_layernorm = attention.k_layernorm = RootNorm
    is_dense = hasattr(mlp, "linear_fc1")
    parts.pre_mlp_layernorm = IdentityOp if is_dense else RootNorm
    if is_dense:
        mlp.linear_fc1 = TELayerNormColumnParallelLinear
    if is_around:
        attention.linear_proj = mlp.linear_fc2 = TERowParallelLinearLayerNorm
