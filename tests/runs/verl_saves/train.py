"""Trains tiny models under FSDP on CPU and saves them with verl's own checkpoint manager, each beside its oracle.

Needs `torch`, `transformers`, `peft`, `accelerate` and `verl` (`pip install --no-deps verl omegaconf tensordict
antlr4-python3-runtime codetiming`; their versions go into `fixture.json`). Starts one process a rank:

    python tests/runs/verl_saves/train.py OUT --ranks 2 --case actor --fsdp 1

The oracle is what lived in memory: parameters and buffers gathered by FSDP in the run, and both Adam moments. Nothing
that reads checkpoints takes part.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.machinery
import importlib.util
import json
import shutil
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from ranks import run_ranks

STEPS = 2
# verl's package imports these; its checkpoint manager never calls them.
UNUSED = ("ray", "pandas", "hydra", "datasets", "pkg_resources", "transfer_queue", "torchdata", "pyarrow", "PIL")


@dataclass(frozen=True)
class Case:
    """A model and how verl wraps it."""

    model: str
    dtype: str = "fp32"
    replicas: int = 1
    save: tuple[str, ...] = ("model", "optimizer", "extra")
    lora_only: bool = False
    original: bool = False


CASES = {
    "actor": Case("lm"),
    "actor-tied": Case("lm-tied"),
    "actor-bf16": Case("lm", dtype="bf16"),
    "actor-hsdp": Case("lm", replicas=2),
    "actor-whole": Case("lm", save=("model", "hf_model")),
    "actor-original": Case("lm", original=True),
    "critic": Case("critic"),
    "critic-hsdp": Case("critic", replicas=2),
    "critic-buffers": Case("critic-buffers"),
    "lora": Case("lora"),
    "lora-bf16": Case("lora", dtype="bf16"),
    "lora-only": Case("lora", lora_only=True),
    "lora-critic": Case("lora-critic"),
    "lora-critic-frozen": Case("lora-critic-frozen"),
}


def launch(out: Path, cases: list[str], versions: list[int], ranks: int) -> None:
    """Start one process a rank and wait for them."""
    chosen = [word for case in cases for word in ("--case", case)]
    chosen += [word for version in versions for word in ("--fsdp", str(version))]
    run_ranks(ranks, __file__, out, "--ranks", ranks, "--worker", *chosen)


class Unused:
    """Stands for anything of a package that is not needed here."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if len(args) == 1 and callable(args[0]) else self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Unused()


class Stubs:
    """Finds what verl imports and this run does not use."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.partition(".")[0] not in UNUSED:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: Any) -> Any:
        module = types.ModuleType(spec.name)
        module.__getattr__ = _attribute  # type: ignore[method-assign]
        return module

    def exec_module(self, module: Any) -> None:
        module.__path__ = []


def _attribute(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (Unused,), {})


def work(out: Path, cases: list[str], versions: list[int], ranks: int) -> None:
    """One rank: every case under every FSDP, one after the other."""
    import torch.distributed as dist

    sys.meta_path.append(Stubs())  # type: ignore[arg-type]
    dist.init_process_group("gloo")
    for name in cases:
        for version in versions:
            train(out / f"{name}-fsdp{version}-n{ranks}", name, CASES[name], version, ranks)
    dist.destroy_process_group()


def train(folder: Path, name: str, case: Case, version: int, ranks: int) -> None:
    """Train, save the checkpoint into `folder` and the oracle beside it."""
    import torch
    import torch.distributed as dist
    from omegaconf import OmegaConf
    from verl.utils.checkpoint.fsdp_checkpoint_manager import FSDPCheckpointManager

    rank = dist.get_rank()
    if rank == 0 and folder.exists():
        shutil.rmtree(folder)
    dist.barrier()
    torch.manual_seed(1)
    plain, loss = build(case.model)
    plain = plain.to(torch.bfloat16 if case.dtype == "bf16" else torch.float32)
    model = wrap(plain, case, version, ranks)
    # Like verl, which gives AdamW all parameters, frozen ones included.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(STEPS):
        torch.manual_seed(100 * step + rank)
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(model)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
    asked = OmegaConf.create({"save_contents": list(case.save), "load_contents": ["model"]})
    if case.lora_only:
        asked.save_lora_only = True
    manager = FSDPCheckpointManager(model, optimizer, processing_class=None, checkpoint_config=asked)
    found = oracle(model, optimizer, version, case.original)
    manager.save_checkpoint(str(folder), global_step=STEPS)
    dist.barrier()
    if rank == 0:
        finish(folder, plain, found, {"case": name, "fsdp": version, "ranks": ranks, **describe(case)})
    dist.barrier()


def wrap(model: Any, case: Case, version: int, ranks: int) -> Any:
    """As verl's FSDP engine does it, on CPU.

    Source: https://github.com/volcengine/verl/blob/v0.9.1/verl/workers/engine/fsdp/transformer_impl.py
    """
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, ShardingStrategy
    from verl.utils.fsdp_utils import apply_fsdp2, get_fsdp_wrap_policy

    shape, names = ((ranks,), ("fsdp",))
    if case.replicas > 1 and ranks > 2:  # fsdp_size is 2
        shape, names = ((ranks // 2, 2), ("ddp", "fsdp"))  # type: ignore[assignment]
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    if version == 2:
        apply_fsdp2(model, {"mesh": mesh}, {"wrap_policy": {}})
        return model
    policy = get_fsdp_wrap_policy(model, config=None, is_lora=case.model.startswith("lora"))
    strategy = ShardingStrategy.HYBRID_SHARD if len(shape) > 1 else ShardingStrategy.FULL_SHARD
    return FullyShardedDataParallel(
        model,
        auto_wrap_policy=policy,
        sharding_strategy=strategy,
        mixed_precision=MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.float32),
        device_mesh=mesh,
        device_id=torch.device("cpu"),
        use_orig_params=case.original,
    )


def build(kind: str) -> tuple[Any, Any]:
    """A model and a function that gives its loss."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForTokenClassification

    config = LlamaConfig(
        vocab_size=29, hidden_size=12, intermediate_size=20, num_hidden_layers=1 if "critic" in kind else 2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32, pad_token_id=0, num_labels=1,
        tie_word_embeddings=kind == "lm-tied", use_cache=False,
    )  # fmt: skip
    is_critic = "critic" in kind
    model: Any = (LlamaForTokenClassification if is_critic else LlamaForCausalLM)(config)
    model.config.architectures = [type(model).__name__]
    if kind == "critic-buffers":
        model.register_buffer("mean", torch.randn(7))
        model.register_buffer("steps", torch.tensor(5))
        model.register_buffer("scratch", torch.ones(3), persistent=False)
    if kind.startswith("lora"):
        from peft import LoraConfig, get_peft_model

        targets = ["q_proj", "down_proj", *(["score"] if kind == "lora-critic" else [])]
        # With CAUSAL_LM, which verl names for critics too, PEFT wants a model that generates.
        task = None if is_critic else "CAUSAL_LM"
        model = get_peft_model(model, LoraConfig(r=2, lora_alpha=8, target_modules=targets, task_type=task))

    def loss(engine: Any) -> Any:
        tokens = torch.randint(1, 29, (2, 7))
        if not is_critic:
            return engine(input_ids=tokens, labels=tokens, use_cache=False).loss
        return (engine(input_ids=tokens, use_cache=False).logits.float() - 1).pow(2).mean()

    return model, loss


def oracle(model: Any, optimizer: Any, version: int, original: bool) -> dict[str, Any]:
    """Live weights, persistent buffers and moments by name, gathered by FSDP itself; rank 0 keeps them."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    found: dict[str, Any] = {}
    persistent = {n.replace("_fsdp_wrapped_module.", "") for n in _buffer_names(model)}
    for name, buffer in model.named_buffers():
        if (plain := name.replace("_fsdp_wrapped_module.", "")) in persistent:
            found[f"live/{plain}"] = buffer.detach().clone()
    if version == 2:
        for name, parameter in model.named_parameters(remove_duplicate=False):
            found[f"live/{name}"] = parameter.full_tensor().detach().clone()
            for key in ("exp_avg", "exp_avg_sq"):
                if key in optimizer.state.get(parameter, {}):
                    found[f"{key}/{name}"] = optimizer.state[parameter][key].full_tensor().clone()
        return found
    with FullyShardedDataParallel.summon_full_params(model, writeback=False):
        for name, parameter in model.named_parameters(remove_duplicate=False):
            found[f"live/{name.replace('_fsdp_wrapped_module.', '')}"] = parameter.detach().clone()
    if original:
        return found | stretches(model, optimizer, found)
    states = FullyShardedDataParallel.full_optim_state_dict(model, optimizer, rank0_only=False)["state"]
    for name, state in states.items():
        for key in ("exp_avg", "exp_avg_sq"):
            if key in state:
                found[f"{key}/{name.replace('_fsdp_wrapped_module.', '')}"] = state[key].clone()
    return found


def stretches(model: Any, optimizer: Any, found: dict[str, Any]) -> dict[str, Any]:
    """Moments under `use_orig_params`, each rank's stretch of a parameter after the other's. (On CPU
    `full_optim_state_dict` gathers both moments into one buffer.)
    """
    import torch
    import torch.distributed as dist

    made = {}
    for name, parameter in model.named_parameters():
        plain = name.replace("_fsdp_wrapped_module.", "")
        own = optimizer.state.get(parameter, {})
        for key in ("exp_avg", "exp_avg_sq"):
            parts: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(parts, own[key].flatten() if key in own else torch.empty(0))
            made[f"{key}/{plain}"] = torch.cat(parts).view_as(found[f"live/{plain}"])
    return made


def _buffer_names(model: Any) -> list[str]:
    """Names of persistent buffers."""
    found = []
    for prefix, module in model.named_modules():
        kept = [n for n in module._buffers if n not in module._non_persistent_buffers_set]
        found += [f"{prefix}.{n}" if prefix else n for n in kept]
    return found


def describe(case: Case) -> dict[str, Any]:
    from importlib.metadata import version

    versions = {n: version(n) for n in ("torch", "transformers", "peft", "accelerate")}
    source = importlib.util.find_spec("verl")
    assert source is not None and source.origin is not None
    versions["verl"] = (Path(source.origin).parent / "version" / "version").read_text().strip()
    return {"model": case.model, "dtype": case.dtype, "replicas": case.replicas, "steps": STEPS, "versions": versions}


def finish(folder: Path, model: Any, found: dict[str, Any], facts: dict[str, Any]) -> None:
    """Oracle and provenance; random states, which no reader needs and no two runs share, are removed."""
    from safetensors.torch import save_file

    for path in folder.glob("extra_state_world_size_*"):
        if not path.name.endswith("rank_0.pt") or facts["case"] != "actor":
            path.unlink()
    save_file({k: v.clone().contiguous() for k, v in found.items()}, folder / "oracle.safetensors")
    if facts["case"] == "actor-whole":
        merge_with_verl(folder)
    if hasattr(model, "peft_config"):
        value = {k: sorted(v) if isinstance(v, set) else v for k, v in model.peft_config["default"].to_dict().items()}
        value = {k: getattr(v, "value", v) for k, v in value.items()}
        (folder / "config-of-peft.json").write_text(json.dumps(value, indent=2, sort_keys=True, default=str))
    facts["files"] = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    (folder / "fixture.json").write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n")


def merge_with_verl(folder: Path) -> None:
    """What verl's own merger makes of it, to compare with."""
    from verl.model_merger.base_model_merger import ModelMergerConfig
    from verl.model_merger.fsdp_model_merger import FSDPModelMerger

    out = folder / "merged"
    places = {"local_dir": str(folder), "target_dir": str(out), "hf_model_config_path": str(folder / "huggingface")}
    with contextlib.suppress(ValueError):  # after the model it wants the tokenizer, and there is none
        FSDPModelMerger(ModelMergerConfig(operation="merge", backend="fsdp", **places)).merge_and_save()
    (out / "model.safetensors").rename(folder / "merged-by-verl.safetensors")
    shutil.rmtree(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--case", action="append", choices=sorted(CASES))
    parser.add_argument("--fsdp", action="append", type=int, choices=[1, 2])
    parser.add_argument("--worker", action="store_true")
    given = parser.parse_args()
    run = work if given.worker else launch
    run(given.out, given.case or sorted(CASES), given.fsdp or [1, 2], given.ranks)


if __name__ == "__main__":
    main()
