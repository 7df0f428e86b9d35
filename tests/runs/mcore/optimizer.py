"""Trains a tiny GPTModel for two steps with megatron-core's own Adam on CPU and saves it with its optimizer.

    python tests/runs/mcore/optimizer.py OUT --kinds plain fully_reshardable dp_reshardable

Two data-parallel ranks; each kind goes to `OUT/KIND`, with the live masters and moments beside it, by the names of
local modules (`live.safetensors`). `plain` is the optimizer that is not distributed. Needs what `save.py` needs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from models import built, in_megatron
from save import _arguments, model_chunks, replicas

from ranks import join, launch, place

CASE = "qwen3"


def on_cpu() -> None:
    """Adam asks for tensors on a GPU, and for their types there: those of the CPU are given."""
    import torch

    kind = torch.Tensor.type
    torch.Tensor.type = lambda self, *a, **k: (  # type: ignore[method-assign, assignment]
        kind(self, *a, **k) if a or k else kind(self).replace("torch.", "torch.cuda.")
    )
    for name in ("tensor", "zeros", "empty", "ones"):
        made = getattr(torch, name)

        def plain(*given: Any, made: Any = made, **named: Any) -> Any:
            if str(named.get("device")).startswith("cuda"):
                named["device"] = "cpu"
            return made(*given, **named)

        setattr(torch, name, plain)
    torch.cuda.empty_cache = lambda: None


def work(out: Path, kind: str, asked: argparse.Namespace) -> None:
    """One rank."""
    import torch
    import torch.distributed as dist
    from megatron.core import dist_checkpointing
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    place(asked)
    theirs = built(CASE)
    if dist.get_rank() == 0:
        out.mkdir(parents=True)
        theirs.save_pretrained(out / "hf")
    whole = in_megatron(theirs.state_dict(), theirs.config)
    (model,) = model_chunks(theirs.config, asked)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(whole[name])
    model.bfloat16()
    is_split = kind != "plain"
    settings = DistributedDataParallelConfig(use_distributed_optimizer=is_split, overlap_grad_reduce=False)
    wrapped = DistributedDataParallel(model.config, settings, model)
    config = OptimizerConfig(
        optimizer="adam", lr=1e-2, bf16=True, params_dtype=torch.bfloat16, use_distributed_optimizer=is_split,
        clip_grad=0.0,
    )  # fmt: skip
    optimizer = get_megatron_optimizer(config, [wrapped])
    for group in optimizer.param_groups:
        group["lr"] = 1e-2
    generator = torch.Generator().manual_seed(5)
    for _ in range(2):
        for parameter in model.parameters():
            parameter.main_grad.copy_(torch.randn(parameter.shape, generator=generator))
        wrapped.finish_grad_sync()
        optimizer.step()
    metadata = replicas() | ({"distrib_optim_sharding_type": kind} if is_split else {})
    held = model.sharded_state_dict(metadata=metadata)
    state = {"model": held, "optimizer": optimizer.sharded_state_dict(held, metadata=metadata)}
    state |= {"args": _arguments(theirs.config, asked), "checkpoint_version": 3.0, "iteration": 2}
    folder = out / "iter_0000002"
    if dist.get_rank() == 0:
        folder.mkdir()
    dist.barrier()
    live = _live(model, optimizer)
    dist_checkpointing.save(state, str(folder), content_metadata=metadata if is_split else None)
    if dist.get_rank() == 0:
        from safetensors.torch import save_file

        save_file(live, out / "live.safetensors")
    dist.barrier()


def _live(model: Any, optimizer: Any) -> dict[str, Any]:
    """Whole masters and moments, by name: what ranks have is put together."""
    import torch
    import torch.distributed as dist

    found: dict[str, Any] = {}
    optimizer = optimizer.chained_optimizers[0] if hasattr(optimizer, "chained_optimizers") else optimizer
    for name, parameter in model.named_parameters():
        if hasattr(optimizer, "_get_model_param_range_map"):
            every = {k: torch.zeros(parameter.numel()) for k in ("master", "exp_avg", "exp_avg_sq")}
            try:
                span = optimizer._get_model_param_range_map(parameter)["param"]
            except KeyError:
                span = None
            if span is not None:
                group, order = optimizer.model_param_group_index_map[parameter]
                main = optimizer.optimizer.param_groups[group]["params"][order]
                held = optimizer.optimizer.state[main]
                for key, value in (("master", main), *((k, held[k]) for k in ("exp_avg", "exp_avg_sq"))):
                    every[key][span.start : span.end] = value.detach().flatten()
            for value in every.values():
                dist.all_reduce(value)
        else:
            held = optimizer.optimizer.state[parameter.main_param]
            every = {"master": parameter.main_param, "exp_avg": held["exp_avg"], "exp_avg_sq": held["exp_avg_sq"]}
        found |= {f"{key}/{name}": v.detach().reshape(parameter.shape).clone() for key, v in every.items()}
    return found


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--kinds", nargs="+", default=["plain", "fully_reshardable", "dp_reshardable"])
    parser.add_argument("--worker", action="store_true")
    parser.set_defaults(
        tp=1, pp=1, ep=1, vpp=None, etp=None, first_stage=None, per_layer=False, critic=0, head_bias=False
    )
    asked = parser.parse_args()
    if not asked.worker:
        raise SystemExit(not launch(2, sys.argv))
    join()
    on_cpu()
    for kind in asked.kinds:
        work(asked.out / kind, kind, asked)


if __name__ == "__main__":
    main()
