"""Trains tiny models with torch's FSDP and accelerate on CPU and saves each distributed checkpoint beside its oracle.

Needs `torch`, `accelerate`, `transformers`, `peft` (their versions go into `fixture.json`). Starts one process a rank:

    python tests/runs/dcp/train.py OUT --ranks 2 --case tp

Run it beside `runs` with OUT relative: `.metadata` keeps the path. The oracle is what lived in memory: every DTensor
gathered by itself during the run, moments likewise. No tool that reads checkpoints takes part.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from living import leave_on_cpu, live, live_fsdp1
from models import build, odd_state

from ranks import run_ranks

STEPS = 2


@dataclass(frozen=True)
class Case:
    """What is trained and how it is saved.

    Attributes:
        model: one of `models.build`, or `odd`: tensors of every type and awkward shape, not trained.
        layout: `nested` ({model, optim, step}), `app` (that below one more key), `flat-optim` (torchtitan's), `plain`
            (the model alone), `hf-*` (HuggingFaceStorageWriter), `accelerate-*` (its three kinds of state dict).
        mesh: `fsdp`, `hsdp` (ranks / 2 replicas of 2 shards), `tp` (ranks / 2 x 2: FSDP over tensor parallel), `ddp`
            (replicated), or `none`.
        fsdp: version of FSDP under accelerate.
        strategy: of FSDP; `original`: its `use_orig_params` (FSDP1).
        files: `rank` (one each), `threads` (two each) or `item` (one for each chunk).
    """

    model: str
    layout: str
    mesh: str = "fsdp"
    dtype: str = "fp32"
    fsdp: int = 2
    files: str = "rank"
    ranks: tuple[int, ...] = (1, 2, 3, 4)
    steps: int = STEPS
    strategy: str = "FULL_SHARD"
    original: bool = True


CASES = {
    "nested": Case("tiny", "nested", dtype="bf16-mixed"),
    "nested-lm": Case("lm-tied", "nested", dtype="bf16-mixed"),
    "untrained": Case("reward", "app", dtype="bf16", files="threads", steps=0),
    "app": Case("reward", "app", dtype="bf16", files="threads"),
    "titan": Case("tiny", "flat-optim"),
    "titan-lm": Case("lm", "flat-optim", files="item"),
    "tp": Case("lm", "plain", mesh="tp", ranks=(4,)),
    "tp-moments": Case("lm", "nested", mesh="tp", ranks=(4,)),
    "ddp": Case("reward", "nested", mesh="ddp"),
    "alone": Case("reward", "plain", mesh="none", dtype="fp16", files="item", ranks=(1,)),
    "odd": Case("odd", "plain"),
    "odd-grid": Case("odd", "plain", mesh="tp", ranks=(4,)),
    "odd-nested": Case("odd", "nested"),
    "hf": Case("reward", "hf-consolidated"),
    "hf-shards": Case("reward", "hf-shards"),
    "hf-whole": Case("reward", "hf-whole", mesh="none", ranks=(1,)),
    "accelerate": Case("lm-tied", "accelerate-sharded"),
    "accelerate-bf16": Case("reward", "accelerate-sharded", dtype="bf16-mixed"),
    "accelerate-lora": Case("lora", "accelerate-sharded"),
    "accelerate-adapter": Case("lora-saved", "accelerate-adapter"),
    "accelerate-full": Case("lm-tied", "accelerate-full"),
    "accelerate-ranks": Case("reward", "accelerate-ranks"),
    "fsdp1": Case("tiny", "accelerate-sharded", fsdp=1, ranks=(2, 3, 4)),
    "fsdp1-lm": Case("lm-tied", "accelerate-sharded", fsdp=1, ranks=(2, 3, 4)),
    "fsdp1-local": Case("reward", "accelerate-local", fsdp=1, ranks=(2,)),
    "hsdp": Case("lm-tied", "nested", mesh="hsdp", ranks=(4,)),
    "hsdp-app": Case("reward", "app", mesh="hsdp", dtype="bf16", ranks=(4,)),
    "mixed": Case("lm-mixed", "nested", ranks=(2, 3)),
    "frozen": Case("lm-frozen-mlp", "nested", ranks=(2, 3)),
    "frozen-flat": Case("lm-frozen-mlp", "flat-optim", mesh="hsdp", ranks=(4,)),
    "accelerate-mixed": Case("lm-mixed", "accelerate-sharded", ranks=(2,)),
    "accelerate-frozen": Case("lm-frozen-mlp", "accelerate-sharded", ranks=(2,)),
    "accelerate-frozen-full": Case("lm-frozen-mlp", "accelerate-full", ranks=(2,)),
    "accelerate-grad-op": Case("lm-tied", "accelerate-sharded", strategy="SHARD_GRAD_OP", ranks=(2,)),
} | {
    f"fsdp1-{word}{'' if layout == 'sharded' else f'-{layout}'}": Case(
        model, f"accelerate-{layout}", fsdp=1, ranks=(ranks,), mesh=mesh, strategy=strategy, original=original
    )
    for word, model, mesh, strategy, original, ranks in (
        ("hybrid", "lm-tied", "hsdp", "HYBRID_SHARD", True, 4),
        ("hybrid-flat", "reward", "hsdp", "HYBRID_SHARD", False, 4),
        ("grad-op", "lm-tied", "fsdp", "SHARD_GRAD_OP", True, 3),
        ("grad-op-flat", "reward", "fsdp", "SHARD_GRAD_OP", False, 2),
        ("mixed", "lm-mixed", "fsdp", "FULL_SHARD", True, 2),
        ("frozen-mlp", "lm-frozen-mlp", "fsdp", "FULL_SHARD", True, 2),
        ("frozen-layer", "lm-frozen-layer", "fsdp", "FULL_SHARD", False, 2),
        ("frozen-layer-orig", "lm-frozen-layer", "fsdp", "FULL_SHARD", True, 2),
    )
    for layout in ("sharded", "full", "local")
    # torch: DeviceMesh is not compatible with LOCAL_STATE_DICT; on a CPU it puts both moments into one buffer for a
    # full state with `use_orig_params`.
    if (layout, mesh) != ("local", "hsdp") and not (layout == "full" and original)
}


def launch(out: Path, cases: list[str], ranks: int) -> None:
    """Start one process a rank and wait for them."""
    chosen = [word for case in cases for word in ("--case", case)]
    run_ranks(ranks, __file__, out, "--ranks", ranks, "--worker", *chosen, ACCELERATE_USE_CPU="true")


def work(out: Path, cases: list[str], ranks: int) -> None:
    """One rank: every case, one after the other."""
    import torch
    import torch.distributed as dist

    warnings.filterwarnings("ignore")
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    leave_on_cpu()
    for name in cases:
        case = CASES[name]
        if ranks not in case.ranks:
            continue
        folder = out / f"{name}-n{ranks}"
        if dist.get_rank() == 0 and folder.exists():
            shutil.rmtree(folder)
        dist.barrier()
        torch.manual_seed(1)
        save = save_odd if case.model == "odd" else save_accelerate if "accelerate" in case.layout else save_torch
        found, extra = save(folder, case)
        dist.barrier()
        if dist.get_rank() == 0:
            finish(folder, found, {"case": name, **asdict(case), **extra, "ranks": ranks})
        dist.barrier()
    dist.destroy_process_group()


def steps(model: Any, loss: Any, optimizer: Any, count: int, backward: Any = None, same_tokens: int = 1) -> None:
    import torch
    import torch.distributed as dist

    for step in range(count):
        # Tensor-parallel ranks must see the same tokens.
        torch.manual_seed(100 * step + dist.get_rank() // same_tokens)
        value = loss(model)
        (backward or (lambda v: v.backward()))(value)
        optimizer.step()
        optimizer.zero_grad()


def hybrid_mesh() -> Any:
    """Two shards, and as many replicas as the ranks make."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("replicas", "fsdp"))


def shard(model: Any, case: Case) -> Any:
    """The model over the case's mesh."""
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    ranks = dist.get_world_size()
    if case.mesh == "none":
        return model
    if case.mesh == "ddp":
        return torch.nn.parallel.DistributedDataParallel(model)
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("fsdp",))
    if case.mesh == "hsdp":
        mesh = hybrid_mesh()
    if case.mesh == "tp":
        both = init_device_mesh("cpu", (ranks // 2, 2), mesh_dim_names=("fsdp", "tp"))
        plan = {f"self_attn.{n}_proj": ColwiseParallel() for n in "qkv"}
        plan |= {"self_attn.o_proj": RowwiseParallel(), "mlp.down_proj": RowwiseParallel()}
        plan |= {"mlp.gate_proj": ColwiseParallel(), "mlp.up_proj": ColwiseParallel()}
        for layer in model.model.layers:
            parallelize_module(layer, both["tp"], plan)
        mesh = both["fsdp"]
    mixed = MixedPrecisionPolicy(param_dtype=torch.bfloat16) if case.dtype == "bf16-mixed" else MixedPrecisionPolicy()
    norms = [m for n, m in model.named_modules() if n.endswith("norm")] if case.model == "lm-mixed" else []
    for layer in [*norms, *(model.model.layers if hasattr(model, "model") else ())]:
        fully_shard(layer, mesh=mesh, mp_policy=mixed)
    return fully_shard(model, mesh=mesh, mp_policy=mixed)


def save_torch(folder: Path, case: Case) -> tuple[dict[str, Any], dict[str, Any]]:
    """Train with torch alone and save with torch.distributed.checkpoint."""
    import torch
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_state_dict

    model, loss = build(case.model)
    config = getattr(model, "config", None)
    model = shard(model if case.model == "lm-mixed" else model.to(DTYPES()[case.dtype]), case)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    steps(model, loss, optimizer, case.steps, same_tokens=2 if case.mesh == "tp" else 1)
    options = StateDictOptions(flatten_optimizer_state_dict=case.layout == "flat-optim")
    weights, moments = get_state_dict(model, optimizer, options=options)
    state: dict[str, Any] = {"model": weights, "optim": moments, "step": case.steps, "seen": torch.tensor(7)}
    if not case.steps:
        del state["optim"]
    if case.layout == "app":
        state = {"app": state, "rng": torch.get_rng_state()}
    if case.layout == "flat-optim":
        state = {**weights, "optimizer": moments, "train_state": {"step": torch.tensor(case.steps)}}
    if case.layout == "plain" or case.layout.startswith("hf-"):
        state = get_model_state_dict(model)
    place = str(folder / "step-2")
    if case.layout.startswith("hf-"):
        whole_names = {n: 1 + i % 2 for i, n in enumerate(state)}
        kind = case.layout.removeprefix("hf-")
        writer: Any = dcp.HuggingFaceStorageWriter(
            place, whole_names, save_distributed=kind != "whole", enable_consolidation=kind == "consolidated"
        )
    else:
        threads = 2 if case.files == "threads" else 1
        writer = dcp.FileSystemWriter(place, single_file_per_rank=case.files != "item", thread_count=threads)
    dcp.save(state, storage_writer=writer)
    found = live(model, optimizer)
    if case.layout == "plain" or case.layout.startswith("hf-") or not case.steps:
        found = {n: t for n, t in found.items() if n.startswith("live/")}
    return found, {"config": config and config.to_dict()}


def DTYPES() -> dict[str, Any]:  # noqa: N802
    import torch

    return {"fp32": torch.float32, "bf16-mixed": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def save_odd(folder: Path, case: Case) -> tuple[dict[str, Any], dict[str, Any]]:
    """Save tensors of every type and awkward shape, which nothing trained."""
    import torch.distributed.checkpoint as dcp

    state, found = odd_state(grid=case.mesh == "tp")
    saved = state if case.layout == "plain" else {"state": {"model": state}, "step": 3, "note": {"a": "text"}}
    dcp.save(saved, checkpoint_id=str(folder / "step-2"))
    return found, {"config": None}


def prepared(case: Case, kind: str, lr: float = 1e-2) -> tuple[Any, ...]:
    """Plugin, accelerator, model and optimizer as accelerate has them, what gives the loss, and the model's configs.

    Args:
        kind: `sharded`, `ranks`, `adapter` or `full`; all else is LOCAL_STATE_DICT.
    """
    import torch
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.utils import DistributedType
    from torch.distributed.fsdp import FullyShardedDataParallel

    words = {
        "sharded": "SHARDED_STATE_DICT",
        "ranks": "SHARDED_STATE_DICT",
        "adapter": "SHARDED_STATE_DICT",
        "full": "FULL_STATE_DICT",
    }
    model, loss = build(case.model)
    config, peft = getattr(model, "config", None), getattr(model, "peft_config", None)
    wrapped = ["LlamaDecoderLayer" if config else "Linear", *(["LlamaRMSNorm"] if case.model == "lm-mixed" else [])]
    how: dict[str, Any] = {"sharding_strategy": case.strategy, "use_orig_params": case.original}
    if case.fsdp == 2:
        how = {"reshard_after_forward": case.strategy == "FULL_SHARD"}
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=case.fsdp, state_dict_type=words.get(kind, "LOCAL_STATE_DICT"),
        auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=wrapped, **how,
    )  # fmt: skip
    mixed = "bf16" if case.dtype == "bf16-mixed" else "no"
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin, mixed_precision=mixed)
    # Not offered on a CPU, where nobody trains so; torch can.
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
    if mixed != "no":
        plugin.set_mixed_precision(mixed)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    if case.fsdp == 1:  # wrapped by hand: accelerate would name the device cpu:0, which FSDP 1 takes for another
        plugin.set_auto_wrap_policy(model)
        model = FullyShardedDataParallel(
            model, auto_wrap_policy=plugin.auto_wrap_policy, use_orig_params=case.original,
            device_id=torch.device("cpu"), mixed_precision=plugin.mixed_precision_policy,
            sharding_strategy=plugin.sharding_strategy, device_mesh=hybrid_mesh() if case.mesh == "hsdp" else None,
        )  # fmt: skip
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    model, optimizer = accelerator.prepare(model, optimizer)
    accelerator.state.distributed_type = DistributedType.FSDP  # preparing sets it anew, and loading asks for it
    return plugin, accelerator, model, optimizer, loss, (config, peft)


def save_accelerate(folder: Path, case: Case) -> tuple[dict[str, Any], dict[str, Any]]:
    """Train with accelerate and save its state as Trainer does, into `checkpoint-2`."""
    from accelerate.utils import save_fsdp_model, save_fsdp_optimizer

    kind = case.layout.removeprefix("accelerate-")
    plugin, accelerator, model, optimizer, loss, (config, peft) = prepared(case, kind)
    steps(model, loss, optimizer, case.steps, accelerator.backward)
    place = folder / "checkpoint-2"
    # Trainer saves the adapter alone where the model is PEFT's.
    save_fsdp_model(plugin, accelerator, model, str(place), adapter_only=kind == "adapter", use_dcp=kind != "ranks")
    save_fsdp_optimizer(plugin, accelerator, optimizer, model, str(place), use_dcp=kind != "ranks")
    found = live(model, optimizer.optimizer)
    if case.fsdp == 1:
        found = live_fsdp1(model, optimizer, original=case.original, shards=2 if case.mesh == "hsdp" else None)
    extra = {"config": config and config.to_dict(), "peft": None if peft is None else peft["default"].to_dict()}
    accelerator.free_memory()
    accelerator.state._reset_state(reset_partial_state=True)
    return found, extra


def finish(folder: Path, found: dict[str, Any], facts: dict[str, Any]) -> None:
    """Config, oracle and provenance."""
    import accelerate
    import peft
    import torch
    import transformers
    from safetensors.torch import save_file

    versions = {m.__name__: m.__version__ for m in (torch, accelerate, transformers, peft)}
    save_file({k: v.clone().contiguous() for k, v in found.items()}, folder / "oracle.safetensors")
    config, lora = facts.pop("config"), facts.pop("peft", None)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config, indent=2, default=str))
    if lora is not None:
        value = {k: sorted(v) if isinstance(v, set) else getattr(v, "value", v) for k, v in lora.items()}
        (folder / "adapter_config.json").write_text(json.dumps(value, indent=2, sort_keys=True, default=str))
    (folder / "fixture.json").write_text(json.dumps(facts | {"versions": versions}, indent=2, sort_keys=True) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--case", action="append", choices=sorted(CASES))
    parser.add_argument("--worker", action="store_true")
    given = parser.parse_args()
    (work if given.worker else launch)(given.out, given.case or sorted(CASES), given.ranks)


if __name__ == "__main__":
    main()
