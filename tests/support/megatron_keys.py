"""What megatron-core's `sharded_state_dict` calls the tensors of its modules."""

from __future__ import annotations

import re

import torch

_EXPERT = re.compile(r"(.+\.mlp\.experts)\.local_experts\.(\d+)\.(.+)")


def experts_as_one(held: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Keys of a checkpoint by names of modules: the experts of a layer are one tensor."""
    found: dict[str, torch.Tensor] = {}
    experts: dict[str, list[torch.Tensor]] = {}
    for name, tensor in held.items():
        if match := _EXPERT.fullmatch(name):
            experts.setdefault(f"{match[1]}.experts.{match[3]}", []).append(tensor)
        else:
            found[name] = tensor
    return found | {n: torch.stack(tensors) for n, tensors in experts.items()}
