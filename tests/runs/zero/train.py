"""Trains tiny models with real DeepSpeed on CPU and saves each checkpoint beside its oracle.

Needs `deepspeed`, `transformers`, `peft` (their versions go into `fixture.json`). Starts one process a rank:

    python tests/runs/zero/train.py OUT --ranks 2 --case lm-tied --stage 3

The oracle is what lived in memory: parameters gathered during training, their fp32 masters and both Adam moments. No
tool that reads checkpoints, DeepSpeed's own included, takes part.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from ranks import run_ranks

STEPS = 2


@dataclass(frozen=True)
class Case:
    """A model and the settings that it is trained with; `given_frozen`: its optimizer gets frozen parameters too."""

    model: str
    dtype: str = "bf16"
    zero: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    stages: tuple[int, ...] = (1, 2, 3)
    groups: int = 1
    exclude_frozen: bool = False
    named: bool = False
    optimizer: str = "adamw"
    given_frozen: bool = False
    tag: str | None = None


CASES = {
    "lm-tied": Case("lm-tied"),
    "lm-fp32": Case("lm", dtype="fp32"),
    "lm-fp16": Case("lm", dtype="fp16"),
    "reward": Case("reward"),
    "odd": Case("odd", groups=2),
    "odd-fp32": Case("odd", dtype="fp32"),
    "subgroups": Case("odd", stages=(3,), groups=2, zero={"sub_group_size": 60}),
    "roundrobin": Case("odd", stages=(1, 2), groups=2, zero={"round_robin_gradients": True}),
    "aligned": Case("odd", stages=(1, 2), zero={"parameter_alignment": True}),
    "roundrobin-aligned": Case(
        "odd", stages=(1, 2), groups=2, zero={"round_robin_gradients": True, "parameter_alignment": True}
    ),
    "elastic": Case("odd", stages=(1, 2), zero={"elastic_checkpoint": True}),
    "bf16-optimizer": Case("odd", stages=(1,), config={"data_types": {"grad_accum_dtype": "fp32"}}),
    "lora": Case("lora"),
    "lora-lean": Case("lora", exclude_frozen=True),
    "lora-frozen-head": Case("lora-frozen-head"),
    "lora-causal": Case("lora-causal"),
    "neox": Case("neox"),
    "vision": Case("vision"),
    "vision-lora": Case("vision-lora"),
    "plain": Case("lm-tied", stages=(0,), dtype="fp32"),
    "plain-bf16": Case("odd", stages=(0,), dtype="bf16"),
    "plain-named": Case("odd", stages=(0,), dtype="fp32", groups=2, named=True),
}


def launch(out: Path, cases: list[str], stages: list[int], ranks: int) -> None:
    """Start one process a rank and wait for them."""
    chosen = [word for case in cases for word in ("--case", case)]
    chosen += [word for stage in stages for word in ("--stage", str(stage))]
    run_ranks(ranks, __file__, out, "--ranks", ranks, "--worker", *chosen)


def work(out: Path, cases: list[str], stages: list[int], ranks: int) -> None:
    """One rank: every case at every stage, one after the other."""
    import deepspeed
    import torch

    deepspeed.init_distributed("gloo", verbose=False)
    # Slow on most CPUs and so not offered; the arithmetic is there.
    deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True
    known = deepspeed.accelerator.get_accelerator().supported_dtypes()
    deepspeed.accelerator.get_accelerator().supported_dtypes = lambda: [*known, torch.float16]
    for name in cases:
        for stage in stages:
            if stage in CASES[name].stages:
                train(out / f"{name}-z{stage}-n{ranks}", name, CASES[name], stage, ranks)


def train(folder: Path, name: str, case: Case, stage: int, ranks: int) -> None:
    """Train, save the checkpoint into `folder` and the oracle beside it."""
    import deepspeed
    import torch
    import torch.distributed as dist

    rank = dist.get_rank()
    if rank == 0 and folder.exists():
        shutil.rmtree(folder)
    dist.barrier()
    torch.manual_seed(1)
    model, batch = build(case.model)
    optimizer = optimizer_of(case, model, rate=1e-2)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings(case, stage))
    for step in range(STEPS):
        torch.manual_seed(100 * step + rank)
        loss = batch(engine)
        engine.backward(loss)
        engine.step()
    engine.save_checkpoint(str(folder), exclude_frozen_parameters=case.exclude_frozen)
    found = oracle(engine, case, stage)
    dist.barrier()
    if rank == 0:
        finish(folder, model, found, {"case": name, "stage": stage, "ranks": ranks, **describe(case)})
    dist.barrier()
    engine.destroy()


def optimizer_of(case: Case, model: Any, rate: float) -> Any:
    """The optimizer that a case names, with its parameters in groups of their own decay."""
    import torch

    given = [(n, p) for n, p in model.named_parameters() if p.requires_grad or case.given_frozen]
    groups: list[Any] = [[t for i, t in enumerate(given) if i % case.groups == g] for g in range(case.groups)]
    groups = groups if case.named else [[p for _, p in group] for group in groups]
    kind: Any = {
        "adamw": torch.optim.AdamW,
        "amsgrad": partial(torch.optim.AdamW, amsgrad=True),
        "sgd": torch.optim.SGD,
        "momentum": partial(torch.optim.SGD, momentum=0.9),
        "adagrad": torch.optim.Adagrad,
        "rmsprop": partial(torch.optim.RMSprop, centered=True, momentum=0.5),
        "nadam": torch.optim.NAdam,
        "adamax": torch.optim.Adamax,
    }[case.optimizer]
    return kind([{"params": g, "weight_decay": 0.1 * i} for i, g in enumerate(groups)], lr=rate)


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


def build(kind: str) -> tuple[Any, Any]:
    """A model and a function that gives its loss."""
    import torch

    if kind == "odd":
        return odd_model(), lambda engine: engine(torch.randn(3, 5, dtype=next(engine.module.parameters()).dtype))
    if kind in ("neox", "vision", "vision-lora"):
        return renamed_model(kind)
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    config = LlamaConfig(
        vocab_size=29, hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, pad_token_id=0, num_labels=1,
        tie_word_embeddings=kind == "lm-tied", use_cache=False,
    )  # fmt: skip
    causal = kind in ("lm", "lm-tied", "lora-causal")
    model: Any = (LlamaForCausalLM if causal else LlamaForSequenceClassification)(config)
    if kind.startswith("lora"):
        from peft import LoraConfig, get_peft_model

        frozen_head = kind == "lora-frozen-head"
        peft = LoraConfig(
            r=2, lora_alpha=8, target_modules=["q_proj", "down_proj", *(["score"] if frozen_head else [])],
            task_type="CAUSAL_LM" if causal else None if frozen_head else "SEQ_CLS",
            modules_to_save=None if causal or frozen_head else ["score"],
        )  # fmt: skip
        model = get_peft_model(model, peft)

    def loss(engine: Any) -> Any:
        tokens = torch.randint(1, 29, (2, 7))
        if causal:
            return engine(input_ids=tokens, labels=tokens).loss
        return engine(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits.float().pow(2).sum() + 0

    return model, loss


def renamed_model(kind: str) -> tuple[Any, Any]:
    """Models whose tensors have other names in memory than on disk; text alone is enough to train them."""
    import torch
    import transformers

    text = {
        "vocab_size": 29, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2,
        "max_position_embeddings": 16, "tie_word_embeddings": False, "use_cache": False,
    }  # fmt: skip
    if kind == "neox":
        model: Any = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**text))
    else:
        vision = {
            "model_type": "clip_vision_model", "hidden_size": 4, "intermediate_size": 6, "num_hidden_layers": 2,
            "num_attention_heads": 1, "image_size": 4, "patch_size": 2,
        }  # fmt: skip
        text |= {"model_type": "llama", "num_key_value_heads": 1}
        config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=28)
        model = transformers.LlavaForConditionalGeneration(config)
        for name, parameter in model.named_parameters():
            parameter.requires_grad = "language_model" in name or "lm_head" in name
    if kind == "vision-lora":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "down_proj"]))

    def loss(engine: Any) -> Any:
        tokens = torch.randint(1, 28, (2, 7))
        return engine(input_ids=tokens, labels=tokens).loss

    return model, loss


def odd_model() -> Any:
    """Sizes that divide by nothing, a shared weight, buffers of three kinds, a frozen weight, a single number."""
    import torch
    from torch import nn

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(5, 7)
            self.norm = nn.LayerNorm(7)
            self.second = nn.Linear(7, 7, bias=False)
            self.twin = nn.Linear(7, 7)
            self.twin.weight = self.second.weight
            self.scale = nn.Parameter(torch.randn(1))
            self.frozen = nn.Parameter(torch.randn(3, 11), requires_grad=False)
            self.last = nn.Linear(7, 13)
            self.register_buffer("steps", torch.arange(5))
            self.register_buffer("mean", torch.randn(7))
            self.register_buffer("scratch", torch.ones(3), persistent=False)

        def forward(self, x: Any) -> Any:
            hidden = self.norm(self.first(x)) + self.mean.to(x.dtype)
            hidden = self.twin(torch.tanh(self.second(hidden)))
            return (self.last(hidden) * self.scale).float().pow(2).mean() + 0 * self.frozen.float().sum()

    return Odd()


def oracle(engine: Any, case: Case, stage: int) -> dict[str, Any]:
    """Live weights, buffers, fp32 masters and moments by name, on rank 0."""
    import deepspeed
    import torch
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    found: dict[str, Any] = {}
    named = list(engine.module.named_parameters(remove_duplicate=False))
    with deepspeed.zero.GatheredParameters([p for _, p in named], enabled=stage == 3):
        found |= {f"live/{n}": p.detach().clone() for n, p in named}
    persistent = set(engine.module.state_dict())
    found |= {f"live/{n}": b.detach().clone() for n, b in engine.module.named_buffers() if n in persistent}
    trained = [(n, p) for n, p in named if p.requires_grad]
    if stage in (1, 2):
        return found | flat_states(engine, trained)
    keys = element_keys(engine.optimizer.optimizer) if stage == 3 else ()
    for name, parameter in trained:
        if stage == 0:
            state = plain_state(engine.optimizer, parameter, is_fp32=case.dtype == "fp32")
            found |= {f"{k}/{name}": v.detach().clone() for k, v in state.items() if getattr(v, "ndim", 0)}
            continue
        found[f"master/{name}"] = safe_get_full_fp32_param(parameter).detach().clone()
        for key in keys:
            found[f"{key}/{name}"] = safe_get_full_optimizer_state(parameter, key).detach().clone()
    return {k: v.contiguous() if isinstance(v, torch.Tensor) else v for k, v in found.items()}


def element_keys(inner: Any) -> tuple[str, ...]:
    """Keys of an optimizer's state that have a value for each element, in an order that all ranks share."""
    import torch

    states = [(p, s) for p, s in inner.state.items() if s]
    if not states:
        return ()
    parameter, state = states[0]
    whole = [k for k, v in state.items() if isinstance(v, torch.Tensor) and v.numel() == parameter.numel() and v.dim()]
    return tuple(sorted(whole))


def plain_state(optimizer: Any, parameter: Any, *, is_fp32: bool) -> Any:
    """Adam's state without ZeRO; in 16 bits it belongs to the parameter's master."""
    if is_fp32:
        return optimizer.state[parameter]
    pairs = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
    masters = [hp for low, high in pairs for lp, hp in zip(low, high, strict=True) if lp is parameter]
    return optimizer.optimizer.state[masters[0]]


def flat_states(engine: Any, trained: list[tuple[str, Any]]) -> dict[str, Any]:
    """Masters and moments of stages 1 and 2: partitions of all ranks laid together, cut where the live flat buffer has
    each parameter. (`safe_get_full_fp32_param` answers wrongly under round robin.)
    """
    import torch
    import torch.distributed as dist

    found: dict[str, Any] = {}
    optimizer = engine.optimizer
    is_bf16 = not hasattr(optimizer, "single_partition_of_fp32_groups")
    masters = optimizer.fp32_groups_flat_partition if is_bf16 else optimizer.single_partition_of_fp32_groups
    flats = optimizer.bf16_groups_flat if is_bf16 else optimizer.bit16_groups_flat
    inner = optimizer.optimizer
    for flat, master in zip(flats, masters, strict=True):
        if not flat.numel():
            continue
        whole = {"master": master, **{k: inner.state[master][k] for k in element_keys(inner)}}
        for key, part in whole.items():
            parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
            dist.all_gather(parts, part.detach().contiguous())
            joined = torch.cat(parts)
            for name, parameter in trained:
                distance = parameter.data_ptr() - flat.data_ptr()
                start = distance // flat.element_size()
                if distance >= 0 and start + parameter.numel() <= flat.numel() and _same_storage(parameter, flat):
                    found[f"{key}/{name}"] = joined[start : start + parameter.numel()].view_as(parameter).clone()
    missing = [n for n, _ in trained if f"master/{n}" not in found]
    if missing:
        raise RuntimeError(f"not found in the flat buffers: {missing}")
    return found


def _same_storage(a: Any, b: Any) -> bool:
    return bool(a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr())


def describe(case: Case) -> dict[str, Any]:
    import deepspeed
    import peft
    import torch
    import transformers

    versions = {m.__name__: m.__version__ for m in (deepspeed, torch, transformers, peft)}
    return {"dtype": case.dtype, "zero": case.zero, "steps": STEPS, "versions": versions}


def finish(folder: Path, model: Any, found: dict[str, Any], facts: dict[str, Any]) -> None:
    """Config, oracle and provenance; what no reader needs is removed."""
    from safetensors.torch import save_file

    if hasattr(model, "config"):
        model.config.architectures = [type(getattr(model, "get_base_model", lambda: model)()).__name__]

    for script in ("zero_to_fp32.py", "zero_to_torch.py"):
        (folder / script).unlink(missing_ok=True)
    save_file({k: v.clone().contiguous() for k, v in found.items()}, folder / "oracle.safetensors")
    if hasattr(model, "peft_config"):
        value = model.peft_config["default"].to_dict()
        value = {k: sorted(v) if isinstance(v, set) else v for k, v in value.items()}
        value = {k: getattr(v, "value", v) for k, v in value.items()}
        (folder / "adapter_config.json").write_text(json.dumps(value, indent=2, sort_keys=True, default=str))
        (folder / "config-of-run.json").write_text(json.dumps(model.config.to_dict(), indent=2, default=str))
    elif hasattr(model, "config"):
        (folder / "config.json").write_text(json.dumps(model.config.to_dict(), indent=2, default=str))
    finite = all(math.isfinite(float(v.float().sum())) for v in found.values())
    facts |= {"finite": finite, "files": sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())}
    (folder / "fixture.json").write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--case", action="append", choices=sorted(CASES))
    parser.add_argument("--stage", action="append", type=int)
    parser.add_argument("--worker", action="store_true")
    given = parser.parse_args()
    run = work if given.worker else launch
    run(given.out, given.case or sorted(CASES), given.stage or [0, 1, 2, 3], given.ranks)


if __name__ == "__main__":
    main()
