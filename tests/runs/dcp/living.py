"""What lives in a trainer's memory: parameters, buffers and moments by their names, whole."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from models import whole


def live(model: Any, optimizer: Any) -> dict[str, Any]:
    """Parameters, persistent buffers and moments by their names, whole."""
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    names = set(get_model_state_dict(model))
    found = {}
    named = [(clean(n), p) for n, p in model.named_parameters(remove_duplicate=False)]
    for name, value in [*named, *((clean(n), b) for n, b in model.named_buffers())]:
        if name in names:
            found[f"live/{name}"] = whole(value)
    for name, parameter in model.named_parameters():  # of a tied pair the first, as in the optimizer's state
        name = clean(name)
        state = optimizer.state.get(parameter, {})
        for key in ("exp_avg", "exp_avg_sq"):
            if key in state:
                found[f"{key}/{name}"] = whole(state[key])
    return found


def clean(name: str) -> str:
    for part in ("_fsdp_wrapped_module.", "_orig_mod.", "module."):
        name = name.replace(part, "")
    return name


def live_fsdp1(model: Any, optimizer: Any, *, original: bool = True, shards: int | None = None) -> dict[str, Any]:
    """The same of FSDP 1: parameters summoned whole; moments laid together from the ranks' flat stretches.

    Args:
        original: `use_orig_params`.
        shards: ranks of one replica; None: all.
    """
    import torch.distributed as dist
    from torch.distributed.fsdp import FullyShardedDataParallel

    if not original:
        return live_flat(model, optimizer)
    pieces: dict[str, list[Any]] = {}
    for name, parameter in model.named_parameters():
        state = optimizer.optimizer.state.get(parameter, {})
        mine = {k: state[k].detach().clone() for k in ("exp_avg", "exp_avg_sq") if k in state and parameter.numel()}
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, mine)
        pieces[clean(name)] = gathered[:shards]
    found = {}
    with FullyShardedDataParallel.summon_full_params(model, writeback=False):
        for name, parameter in model.named_parameters(remove_duplicate=False):
            found[f"live/{clean(name)}"] = parameter.detach().clone()
            for key in ("exp_avg", "exp_avg_sq"):
                own = [p[key].reshape(-1) for p in pieces.get(clean(name), []) if key in p]
                if own:
                    import torch

                    found[f"{key}/{clean(name)}"] = torch.cat(own).reshape(parameter.shape)
    return found


def live_flat(model: Any, optimizer: Any) -> dict[str, Any]:
    """The same without `use_orig_params`: FSDP itself knows what lies where in its flat parameters."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    found = {}
    states = FullyShardedDataParallel.full_optim_state_dict(model, optimizer.optimizer, rank0_only=False)["state"]
    for name, state in states.items():
        found |= {f"{k}/{clean(name)}": state[k].clone() for k in ("exp_avg", "exp_avg_sq") if k in state}
    with FullyShardedDataParallel.summon_full_params(model, writeback=False):
        for name, parameter in model.named_parameters(remove_duplicate=False):
            found[f"live/{clean(name)}"] = parameter.detach().clone()
    return found


def leave_on_cpu() -> None:
    """Have FSDP 1 move nothing to the CPU that is there: torch frees it, and full states can't be put together."""
    from torch.distributed.fsdp._flat_param import FlatParamHandle

    handle: Any = FlatParamHandle
    handle.to_cpu = lambda self: nullcontext()
