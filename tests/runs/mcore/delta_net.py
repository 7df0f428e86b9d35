"""Qwen3-Next in megatron-core on CPU: specs of its layers, and what a rank has of their tensors.

Norms multiply by 1 + w, which none of megatron-core's modules for the CPU does; the one here does. What stands for
kernels of Triton is the arithmetic that megatron-core has itself for runs that must be deterministic.
"""

from __future__ import annotations

from typing import Any

import torch
from models import PARTS


class Centred(torch.nn.Module):
    """A norm that multiplies by 1 + w."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(hidden_size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """In fp32, as transformers has it."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (wide * (1.0 + self.weight.float())).to(x.dtype)


def block(settings: Any, layer: Any, first: int, count: int) -> Any:
    """Specs of a stage's layers, made of that of megatron-core's usual layer."""
    import copy

    from megatron.core.ssm import gated_delta_net as core
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    inside = getattr(core, "common", core)  # a package since 0.19
    inside.HAVE_FLA = True
    inside.l2norm = lambda x: x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 1e-6)
    within = core.GatedDeltaNetSubmodules(in_proj=ColumnParallelLinear, out_norm=Centred, out_proj=RowParallelLinear)
    layers = []
    for number in range(first, first + count):
        made = copy.deepcopy(layer)
        parts = made.submodules
        parts.input_layernorm = parts.pre_mlp_layernorm = Centred
        if settings.linear_attention_freq[number]:
            parts.self_attention = ModuleSpec(module=core.GatedDeltaNet, submodules=within)
            # The key that TransformerEngine's module of norm and projection writes.
            parts.sharded_state_dict_keys_map = {"input_layernorm.": "self_attention.in_proj.layer_norm_"}
        else:
            parts.self_attention.submodules.q_layernorm = Centred
            parts.self_attention.submodules.k_layernorm = Centred
            parts.sharded_state_dict_keys_map = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
        layers.append(made)
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=Centred)


def on_rank(key: str, tensor: torch.Tensor, rank: int, tp: int) -> torch.Tensor | None:
    """A rank's rows of what has parts; None for other tensors."""
    if not key.endswith(("self_attention.in_proj.weight", "self_attention.conv1d.weight")):
        return None
    parts = PARTS if "in_proj" in key else PARTS[:3]
    return torch.cat([part.chunk(tp)[rank] for part in tensor.split(parts)])
