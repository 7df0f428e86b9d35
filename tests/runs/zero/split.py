"""Trains tiny models that real DeepSpeed splits over ranks: experts, layers of a pipeline, slices of tensors.

Needs `deepspeed` and `transformers`. Starts one process a rank:

    python tests/runs/zero/split.py OUT --ranks 2 --case moe --stage 2

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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

STEPS = 2


@dataclass(frozen=True)
class Case:
    """What is split, and how."""

    split: str  # moe, autoep, pipe, tp
    size: int = 2
    dtype: str = "bf16"
    model: str = ""
    stages: tuple[int, ...] = (1, 2)
    zero: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)


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


def launch(out: Path, cases: list[str], stages: list[int], ranks: int) -> None:
    """Start one process a rank and wait for them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for case in cases:
        for stage in stages:
            if stage not in CASES[case].stages:
                continue
            command = [sys.executable, __file__, str(out), "--ranks", str(ranks), "--worker"]
            command += ["--case", case, "--stage", str(stage)]
            workers = []
            for rank in range(ranks):
                place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_SIZE": ranks}
                env = os.environ | {k: str(v) for k, v in place.items()} | {"MASTER_PORT": str(port)}
                env |= {"MASTER_ADDR": "127.0.0.1", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
                workers.append(subprocess.Popen(command, env=env))
            codes = [worker.wait() for worker in workers]
            if any(codes):
                raise SystemExit(f"{case}, stage {stage}: ranks ended with {codes}")


def work(out: Path, case: str, stage: int, ranks: int) -> None:
    """One rank."""
    import deepspeed
    import torch
    import torch.distributed as dist

    deepspeed.init_distributed("gloo", verbose=False)
    deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True
    known = deepspeed.accelerator.get_accelerator().supported_dtypes()
    deepspeed.accelerator.get_accelerator().supported_dtypes = lambda: [*known, torch.float16]
    folder = out / f"{case}-z{stage}-n{ranks}"
    if dist.get_rank() == 0 and folder.exists():
        shutil.rmtree(folder)
    dist.barrier()
    torch.manual_seed(1)
    engine, model = {"moe": train_moe, "autoep": train_autoep, "pipe": train_pipe, "tp": train_tp}[CASES[case].split](
        CASES[case], stage
    )
    engine.save_checkpoint(str(folder))
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


def settings(case: Case, stage: int) -> dict[str, Any]:
    zero = {"stage": stage, "stage3_param_persistence_threshold": 30, "reduce_bucket_size": 1000} | case.zero
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": case.dtype == "bf16"},
        "fp16": {"enabled": case.dtype == "fp16", "initial_scale_power": 4},
    }
    return config | case.config


def _steps(engine: Any, loss: Any) -> None:
    import torch
    import torch.distributed as dist

    for step in range(STEPS):
        torch.manual_seed(100 * step + dist.get_rank())
        engine.backward(loss(engine))
        engine.step()


def train_moe(case: Case, stage: int) -> tuple[Any, Any]:
    """DeepSpeed's own mixture of experts."""
    import deepspeed
    import torch
    from deepspeed.moe.layer import MoE
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
    from torch import nn

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(6, 5)
            kinds = {"use_residual": case.model == "residual", "k": 1, "min_capacity": 4}
            self.moe = MoE(5, nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 5)), 4, case.size, **kinds)
            self.norm = nn.LayerNorm(5)
            size = 1 if case.model == "two-sizes" else case.size
            self.other = MoE(5, nn.Linear(5, 5), 2, size, **kinds)
            self.last = nn.Linear(5, 3)
            self.register_buffer("mean", torch.randn(5))

        def forward(self, x: Any) -> Any:
            hidden, *_ = self.moe(self.first(x))
            hidden, *_ = self.other(self.norm(hidden) + self.mean.to(x.dtype))
            return self.last(hidden).float().pow(2).mean()

    model = Net()
    group = {"params": list(model.parameters()), "name": "all"}
    groups = split_params_into_different_moe_groups_for_optimizer(group)
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings(case, stage))
    dtype = next(engine.module.parameters()).dtype
    _steps(engine, lambda e: e(torch.randn(9, 6, dtype=dtype)))
    return engine, model


def train_autoep(case: Case, stage: int) -> tuple[Any, Any]:
    """Experts of a model of transformers, spread by AutoEP."""
    import deepspeed
    import torch
    import transformers

    small = {
        "vocab_size": 29, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "max_position_embeddings": 32, "tie_word_embeddings": False, "use_cache": False,
    }  # fmt: skip
    if case.model == "mixtral":
        config = transformers.MixtralConfig(num_local_experts=4, num_experts_per_tok=2, **small)
        model: Any = transformers.MixtralForCausalLM(config)
    else:
        config = transformers.Qwen3MoeConfig(
            num_experts=4, num_experts_per_tok=2, moe_intermediate_size=6, head_dim=4, **small
        )
        model = transformers.Qwen3MoeForCausalLM(config)
    own = settings(case, stage)
    own["expert_parallel"] = {
        "enabled": True, "autoep_size": case.size, "preset_model": case.model, "use_grouped_mm": False
    }  # fmt: skip
    own["optimizer"] = {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}}
    # What 0.19.8 does to transformers' registry of outputs fails with newer versions of it; nothing here needs it.
    from transformers.utils import output_capturing

    registry, output_capturing._CAN_RECORD_REGISTRY = output_capturing._CAN_RECORD_REGISTRY, None
    engine, *_ = deepspeed.initialize(model=model, config=own)
    output_capturing._CAN_RECORD_REGISTRY = registry
    tokens = lambda: torch.randint(1, 28, (2, 7))  # noqa: E731

    def loss(e: Any) -> Any:
        ids = tokens()
        return e(input_ids=ids, labels=ids).loss

    _steps(engine, loss)
    return engine, model


def train_pipe(case: Case, stage: int) -> tuple[Any, Any]:
    """Layers of a pipeline, two of which share a weight."""
    import deepspeed
    import torch
    from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
    from torch import nn

    class Head(nn.Linear):
        """The tied weight read the other way round."""

    def embed(layer: Any, x: Any) -> Any:
        return layer(x)

    specs = [
        TiedLayerSpec("shared", nn.Linear, 6, 6, bias=False, forward_fn=embed),
        LayerSpec(nn.Linear, 6, 7),
        torch.tanh,
        LayerSpec(nn.LayerNorm, 7),
        LayerSpec(nn.Linear, 7, 6),
        TiedLayerSpec("shared", nn.Linear, 6, 6, bias=False, forward_fn=embed),
    ]
    config: Any = None
    if case.model:
        specs, config = llama_layers(tied=case.model == "tied")
    model = PipelineModule(
        specs, num_stages=case.size, loss_fn=lambda out, label: (out.float() - label.float()).pow(2).mean(),
        partition_method="uniform",
    )  # fmt: skip
    own = settings(case, stage)
    own["optimizer"] = {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}}
    engine, *_ = deepspeed.initialize(model=model, config=own, model_parameters=list(model.parameters()))
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}[case.dtype]

    def batches() -> Any:
        torch.manual_seed(5)
        while case.model:
            yield torch.randint(1, 28, (2, 7)), torch.randn(2, 7, 29, dtype=dtype)
        while True:
            yield torch.randn(3, 6, dtype=dtype), torch.randn(3, 6, dtype=dtype)

    data = batches()
    for _ in range(STEPS):
        engine.train_batch(data_iter=data)
    if config is not None:
        model.config = config
    return engine, model


def llama_layers(*, tied: bool) -> tuple[list[Any], Any]:
    """transformers' own layers in a pipeline, as those who train a model of transformers in one do."""
    import torch
    import transformers
    from deepspeed.pipe import LayerSpec, TiedLayerSpec
    from torch import nn
    from transformers.models.llama import modeling_llama as llama

    config = transformers.LlamaConfig(
        vocab_size=29, hidden_size=8, intermediate_size=12, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, tie_word_embeddings=tied, use_cache=False,
    )  # fmt: skip
    config._attn_implementation = "eager"
    config.architectures = ["LlamaForCausalLM"]

    class Block(llama.LlamaDecoderLayer):  # type: ignore[misc]
        def __init__(self, index: int) -> None:
            super().__init__(config, index)
            self.rotary = llama.LlamaRotaryEmbedding(config)

        def forward(self, x: Any) -> Any:
            places = torch.arange(x.shape[1])[None]
            mask = torch.full((x.shape[1], x.shape[1]), -1e9, dtype=x.dtype).triu(1)[None, None]
            out = super().forward(x, attention_mask=mask, position_embeddings=self.rotary(x, places))
            return out[0] if isinstance(out, tuple) else out

    blocks = [LayerSpec(Block, i) for i in range(3)]
    norm = LayerSpec(llama.LlamaRMSNorm, 8)
    if tied:
        project = lambda layer, x: x @ layer.weight.t()  # noqa: E731
        return [
            TiedLayerSpec("embed", nn.Embedding, 29, 8), *blocks, norm,
            TiedLayerSpec("embed", nn.Embedding, 29, 8, forward_fn=project),
        ], config  # fmt: skip
    return [LayerSpec(nn.Embedding, 29, 8), *blocks, norm, LayerSpec(nn.Linear, 8, 29, bias=False)], config


def train_tp(case: Case, stage: int) -> tuple[Any, Any]:
    """A model of transformers whose layers AutoTP slices."""
    import deepspeed
    import torch
    import transformers

    small = {
        "vocab_size": 30, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 32, "tie_word_embeddings": case.model == "tied",
        "use_cache": False,
    }  # fmt: skip
    if case.model == "qwen2":
        model: Any = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**small))
    else:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**small))
    own = settings(case, stage) | {"tensor_parallel": {"autotp_size": case.size}}
    own["optimizer"] = {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}}
    engine, *_ = deepspeed.initialize(model=model, config=own)

    def loss(e: Any) -> Any:
        torch.manual_seed(7)  # slices of one model see the same tokens
        ids = torch.randint(1, 28, (2, 7))
        return e(input_ids=ids, labels=ids).loss

    _steps(engine, loss)
    return engine, model


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
    parser.add_argument("--worker", action="store_true")
    given = parser.parse_args()
    if given.worker:
        work(given.out, given.case[0], given.stage[0], given.ranks)
    else:
        launch(given.out, given.case or sorted(CASES), given.stage or [0, 1, 2, 3], given.ranks)


if __name__ == "__main__":
    main()
