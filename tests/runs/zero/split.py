"""Trains tiny models that real DeepSpeed splits over ranks: experts, layers of a pipeline, slices of tensors.

Needs `deepspeed` and `transformers`. Starts one process a rank:

    python tests/runs/zero/split.py OUT --ranks 2 --case moe --stage 2
    python tests/runs/zero/split.py OUT --ranks 4 --case moe --stage 2 --load RUN

With `--load` a model that was trained otherwise loads RUN, and nothing is saved but what then lives.

As in `train.py` the oracle is what lived in memory, here put together by DeepSpeed's own communication: masters and
moments of every partition by all-gather in the group that it was cut for, slices of tensors by AutoTP's own gathering.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

from split_models import Case, train_autoep, train_moe, train_pipe, train_tp

CASES = {
    "moe": Case("moe"),
    "moe-fp32": Case("moe", dtype="fp32"),
    "moe-fp16": Case("moe", dtype="fp16"),
    "moe-plain": Case("moe", dtype="fp32", stages=(0,)),
    "moe-mixed": Case("moe", model="two-sizes"),
    "moe-residual": Case("moe", model="residual"),
    "moe-data-first": Case("moe", config={"use_data_before_expert_parallelism": True}),
    "autoep-mixtral": Case("autoep", model="mixtral", stages=(1, 2, 3)),
    "autoep-fp32": Case("autoep", model="mixtral", dtype="fp32"),
    "autoep-qwen3": Case("autoep", model="qwen3_moe", stages=(0, 1, 2, 3)),
    "pipe": Case("pipe", stages=(0, 1)),
    "pipe-llama": Case("pipe", stages=(1,), model="llama"),
    "pipe-llama-tied": Case("pipe", stages=(1,), model="tied"),
    "pipe-fp32": Case("pipe", stages=(0, 1), dtype="fp32"),
    "tp": Case("tp", stages=(0, 1, 2)),
    "tp-fp32": Case("tp", stages=(0, 1, 2), dtype="fp32"),
    "tp-tied": Case("tp", model="tied", stages=(1,)),
    "tp-qwen2": Case("tp", model="qwen2", stages=(1, 2)),
}


def launch(out: Path, cases: list[str], stages: list[int], ranks: int, load: Path | None) -> None:
    """Start one process a rank and wait for them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for case in cases:
        for stage in stages:
            if stage not in CASES[case].stages:
                continue
            command = [sys.executable, __file__, str(out), "--ranks", str(ranks), "--worker"]
            command += ["--case", case, "--stage", str(stage), *(["--load", str(load)] if load else [])]
            workers = []
            for rank in range(ranks):
                place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_SIZE": ranks}
                env = os.environ | {k: str(v) for k, v in place.items()} | {"MASTER_PORT": str(port)}
                env |= {"MASTER_ADDR": "127.0.0.1", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
                workers.append(subprocess.Popen(command, env=env))
            codes = [worker.wait() for worker in workers]
            if any(codes):
                raise SystemExit(f"{case}, stage {stage}: ranks ended with {codes}")


def work(out: Path, case: str, stage: int, ranks: int, load: Path | None) -> None:
    """One rank."""
    import deepspeed
    import torch
    import torch.distributed as dist

    deepspeed.init_distributed("gloo", verbose=False, timeout=timedelta(seconds=180))
    deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True
    known = deepspeed.accelerator.get_accelerator().supported_dtypes()
    deepspeed.accelerator.get_accelerator().supported_dtypes = lambda: [*known, torch.float16]
    folder = out / f"{case}-z{stage}-n{ranks}"
    if dist.get_rank() == 0 and folder.exists():
        shutil.rmtree(folder)
    dist.barrier()
    torch.manual_seed(7 if load else 1)
    engine, model = {"moe": train_moe, "autoep": train_autoep, "pipe": train_pipe, "tp": train_tp}[CASES[case].split](
        CASES[case], stage
    )
    if load is None:
        engine.save_checkpoint(str(folder))
    else:
        loaded, _ = engine.load_checkpoint(str(load))
        assert loaded is not None
        folder.mkdir(parents=True, exist_ok=True)
    found = oracle(engine, CASES[case], stage)
    dist.barrier()
    if dist.get_rank() == 0:
        from safetensors.torch import save_file

        (folder / "zero_to_fp32.py").unlink(missing_ok=True)
        (folder / "zero_to_torch.py").unlink(missing_ok=True)
        save_file({k: v.clone().contiguous() for k, v in found.items()}, folder / "oracle.safetensors")
        if hasattr(model, "config"):
            model.config.architectures = model.config.architectures or [type(model).__name__]
            (folder / "config.json").write_text(json.dumps(model.config.to_dict(), indent=2, default=str))
        facts = {"case": case, "stage": stage, "ranks": ranks, "split": CASES[case].split, "dtype": CASES[case].dtype}
        facts["version"] = deepspeed.__version__
        (folder / "fixture.json").write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n")
    dist.barrier()
    os._exit(0)  # engines of a pipeline don't end by themselves on gloo


# What lived


def oracle(engine: Any, case: Case, stage: int) -> dict[str, Any]:
    """Everything by name, on rank 0: `live/`, `master/`, `exp_avg/`, `exp_avg_sq/`."""
    import deepspeed
    import torch
    import torch.distributed as dist

    own: dict[str, Any] = {}
    named = list(engine.module.named_parameters())
    twice = list(engine.module.named_parameters(remove_duplicate=case.split == "pipe"))
    with deepspeed.zero.GatheredParameters([p for _, p in named], enabled=stage == 3):
        own |= {f"live/{n}": p.detach().clone() for n, p in twice}
    persistent = set(engine.module.state_dict()) if case.split != "pipe" else set()
    own |= {f"live/{n}": b.detach().clone() for n, b in engine.module.named_buffers() if n in persistent}
    if stage in (1, 2):
        own |= partitions(engine, named)
    elif stage == 3:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        for name, parameter in named:
            own[f"master/{name}"] = safe_get_full_fp32_param(parameter).detach().clone()
            for key in ("exp_avg", "exp_avg_sq"):
                own[f"{key}/{name}"] = safe_get_full_optimizer_state(parameter, key).detach().clone()
    if case.split in ("tp", "autoep"):
        engine.eval()
        with torch.no_grad():
            own["logits/model"] = engine(input_ids=torch.arange(1, 15).view(2, 7)).logits.detach().clone()
    if case.split == "tp":
        return whole_slices(engine, own)
    if case.split in ("moe", "autoep"):
        own = {f"{k.partition('/')[0]}/{n}": v for k, t in own.items() for n, v in by_expert(engine, k, t)}
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, own)
    found: dict[str, Any] = {}
    for held in ranks:
        for key, value in held.items():
            if key in found and not found[key].equal(value):
                raise RuntimeError(f"{key} differs among ranks")
            found[key] = value
    stacks = sorted({k.rpartition(".")[0] for k in found if re.search(r"\.experts\.w[123]\.\d+$", k)})
    for stack in stacks:
        count = sum(k.rpartition(".")[0] == stack for k in found)
        found[stack] = torch.stack([found.pop(f"{stack}.{i}") for i in range(count)])
    return found


def by_expert(engine: Any, key: str, tensor: Any) -> list[tuple[str, Any]]:
    """A rank's own experts under the numbers that they have among all ranks'."""
    from deepspeed.utils import groups

    name = key.partition("/")[2]
    for path, module in engine.module.named_modules():
        before = f"{path}.deepspeed_moe.experts.deepspeed_experts."
        if name.startswith(before):
            rank = groups._get_expert_parallel_rank(module.expert_group_name)
            local, _, rest = name.removeprefix(before).partition(".")
            return [(f"{before}{rank * module.num_local_experts + int(local)}.{rest}", tensor)]
        match = re.fullmatch(re.escape(path) + r"\.experts\.(w[123])", name)
        if match and type(module).__name__ == "AutoEPMoELayer":
            start = groups._get_expert_parallel_rank(module.ep_group_name) * module.num_local_experts
            return [(f"{name}.{start + i}", t.clone()) for i, t in enumerate(tensor)]
    return [(name, tensor)]


def partitions(engine: Any, named: list[tuple[str, Any]]) -> dict[str, Any]:
    """Masters and moments of stages 1 and 2, each partition gathered in its own group, cut where parameters lie."""
    import torch
    import torch.distributed as dist

    found: dict[str, Any] = {}
    optimizer = engine.optimizer
    is_bf16 = not hasattr(optimizer, "single_partition_of_fp32_groups")
    masters = optimizer.fp32_groups_flat_partition if is_bf16 else optimizer.single_partition_of_fp32_groups
    flats = optimizer.bf16_groups_flat if is_bf16 else optimizer.bit16_groups_flat
    inner = optimizer.optimizer
    for index, (flat, master) in enumerate(zip(flats, masters, strict=True)):
        group = optimizer.real_dp_process_group[index]
        whole = {"master": master, **{k: inner.state[master][k] for k in ("exp_avg", "exp_avg_sq")}}
        for key, part in whole.items():
            parts = [torch.empty_like(part) for _ in range(dist.get_world_size(group))]
            dist.all_gather(parts, part.detach().contiguous(), group=group)
            joined = torch.cat(parts)
            for name, parameter in named:
                if parameter.untyped_storage().data_ptr() != flat.untyped_storage().data_ptr():
                    continue
                start = (parameter.data_ptr() - flat.data_ptr()) // flat.element_size()
                if start >= 0 and start + parameter.numel() <= flat.numel():
                    found[f"{key}/{name}"] = joined[start : start + parameter.numel()].view_as(parameter).clone()
    missing = [n for n, _ in named if f"master/{n}" not in found]
    if missing:
        raise RuntimeError(f"not found in the flat buffers: {missing}")
    return found


def whole_slices(engine: Any, own: dict[str, Any]) -> dict[str, Any]:
    """Slices of AutoTP, put together by its own gathering: each kind is put into the live parameters in turn."""
    import torch
    from deepspeed.module_inject.layers import GatherReplacedLayerParams

    found: dict[str, Any] = {}
    kinds = sorted({k.partition("/")[0] for k in own})
    for kind in kinds:
        for path, module in engine.module.named_modules():
            params = list(module.named_parameters(recurse=False))
            if not params:
                continue
            kept = [p.data for _, p in params]
            names = [f"{path}.{n}" for n, _ in params]
            if any(f"{kind}/{n}" not in own for n in names):
                continue
            for (_, parameter), name in zip(params, names, strict=True):
                parameter.data = own[f"{kind}/{name}"].clone()
            with GatherReplacedLayerParams([p for _, p in params], module, enabled=True):
                for (_, parameter), name in zip(params, names, strict=True):
                    found[f"{kind}/{name}"] = parameter.data.detach().clone()
            for (_, parameter), data in zip(params, kept, strict=True):
                parameter.data = data
    missing = [k for k in own if k not in found and not isinstance(own[k], torch.nn.Module)]
    return found | {k: own[k] for k in missing}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--case", action="append", choices=sorted(CASES))
    parser.add_argument("--stage", action="append", type=int)
    parser.add_argument("--load", type=Path)
    parser.add_argument("--worker", action="store_true")
    given = parser.parse_args()
    if given.worker:
        work(given.out, given.case[0], given.stage[0], given.ranks, given.load)
    else:
        launch(given.out, given.case or sorted(CASES), given.stage or [0, 1, 2, 3], given.ranks, given.load)


if __name__ == "__main__":
    main()
