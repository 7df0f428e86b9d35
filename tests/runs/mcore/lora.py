"""Puts Megatron-Bridge's own LoRA modules around a tiny GPTModel's matrices on CPU, and saves the adapters as it does.

    python tests/runs/mcore/lora.py OUT --tp 2                  the adapters alone
    python tests/runs/mcore/lora.py OUT --tp 2 --whole          with the model that they are in
    python tests/runs/mcore/lora.py OUT --tp 2 --swift          with ms-swift's modules and its own filter instead

`OUT/adapter.safetensors` is the oracle: factors of each matrix of transformers by PEFT's names, of which Megatron's
fused ones were made by `models.py`. `OUT/hf` is the base. Needs megatron-core, transformers, and Megatron-Bridge
(`pip install --no-deps megatron-bridge`), of which two files are imported: the package wants TransformerEngine.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.machinery
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

from models import _grouped as fused
from models import built, in_megatron
from save import _arguments, _fill, _save_sharded, model_chunks, replicas, sliced

from ranks import join, launch, place

CASE, RANK, ALPHA = "qwen3", 4, 8
TARGETS = {
    "self_attention.linear_qkv": ("q_proj", "k_proj", "v_proj"), "self_attention.linear_proj": ("o_proj",),
    "mlp.linear_fc1": ("gate_proj", "up_proj"), "mlp.linear_fc2": ("down_proj",),
}  # fmt: skip


def bridge_modules() -> tuple[Any, Any]:
    """The wrapper and the adapter, without the package around them."""
    import megatron

    (root,) = (Path(p) / "bridge" for p in megatron.__path__ if (Path(p) / "bridge").is_dir())
    for name, folder in (("bridge", root), ("bridge.peft", root / "peft"), ("bridge.utils", root / "utils")):
        package = types.ModuleType(f"megatron.{name}")
        package.__path__ = [str(folder)]
        package.__spec__ = importlib.machinery.ModuleSpec(package.__name__, None, is_package=True)
        sys.modules[package.__name__] = package
    utils = importlib.import_module("megatron.bridge.peft.utils")
    wrapper = importlib.import_module("megatron.bridge.peft.adapter_wrapper")
    return wrapper.AdapterWrapper, utils.ParallelLinearAdapter


def factors(model: Any) -> dict[str, Any]:
    """PEFT's factors of every matrix: one A for those that Megatron has in one."""
    import torch

    generator = torch.Generator().manual_seed(9)
    found: dict[str, Any] = {}
    for number, layer in enumerate(model.model.layers):
        for ours, names in TARGETS.items():
            block = "self_attn" if ours.startswith("self_attention") else "mlp"
            first = getattr(getattr(layer, block), names[0])
            shared = torch.randn(RANK, first.in_features, generator=generator).bfloat16()
            for name in names:
                rows = getattr(getattr(layer, block), name).out_features
                stem = f"base_model.model.model.layers.{number}.{block}.{name}"
                found[f"{stem}.lora_A.weight"] = shared.clone()
                found[f"{stem}.lora_B.weight"] = torch.randn(rows, RANK, generator=generator).bfloat16()
    return found


def whole_factor(found: dict[str, Any], number: int, ours: str, config: Any) -> tuple[Any, Any]:
    """A and B of one of Megatron's matrices."""
    import torch

    block = "self_attn" if ours.startswith("self_attention") else "mlp"
    stem = f"base_model.model.model.layers.{number}.{block}."
    a = found[f"{stem}{TARGETS[ours][0]}.lora_A.weight"]
    each = {n: found[f"{stem}{n}.lora_B.weight"] for n in TARGETS[ours]}
    if ours.endswith("qkv"):
        named = {f"self_attn.{n}.weight": t for n, t in each.items()}
        return a, dict(fused(named, config))["self_attention.linear_qkv.weight"]
    return a, torch.cat([*each.values()])


def work(out: Path, asked: argparse.Namespace) -> None:
    """One rank."""
    import torch.distributed as dist
    from megatron.core import parallel_state
    from safetensors.torch import load_file, save_file

    place(asked)
    theirs = built(CASE)
    adapters = factors(theirs)
    if dist.get_rank() == 0:
        out.mkdir(parents=True)
        theirs.bfloat16().save_pretrained(out / "hf")
        save_file(adapters, out / "adapter.safetensors")
    dist.barrier()
    (model,) = model_chunks(theirs.config, asked)
    _fill(model, in_megatron(load_file(out / "hf" / "model.safetensors"), theirs.config), asked)
    model.bfloat16()
    rank = parallel_state.get_tensor_model_parallel_rank()
    if asked.swift:
        _wrap_as_swift(model, adapters, theirs.config, rank, asked)
    else:
        _wrap_as_bridge(model, adapters, theirs.config, rank, asked)
    _save(out / "iter_0000010", model, theirs.config, asked)
    if dist.get_rank() == 0:
        (out / "latest_checkpointed_iteration.txt").write_text("10")
    dist.barrier()


def _wrap_as_swift(model: Any, adapters: dict[str, Any], config: Any, rank: int, asked: argparse.Namespace) -> None:
    import torch
    from swift_lora import lora_module

    module = lora_module()
    for number, layer in enumerate(model.decoder.layers):
        for ours in TARGETS:
            block, leaf = ours.split(".")
            inner = getattr(getattr(layer, block), leaf)
            if hasattr(inner, "output_size_per_partition"):
                inner.output_size = inner.output_size_per_partition  # as TransformerEngine's count their rows
            made = module(inner, "default", r=RANK, lora_alpha=ALPHA, init_lora_weights=False).bfloat16()
            a, b = whole_factor(adapters, number, ours, config)
            with torch.no_grad():
                for factor, whole in ((made.lora_A["default"], a), (made.lora_B["default"], b)):
                    key = f"{leaf}.weight" if factor is made.lora_B["default"] else "lora_A.weight"
                    factor.weight.copy_(sliced(key, whole, tuple(factor.weight.shape), rank, asked.tp))
            setattr(getattr(layer, block), leaf, made)


def _wrap_as_bridge(model: Any, adapters: dict[str, Any], config: Any, rank: int, asked: argparse.Namespace) -> None:
    import torch
    from megatron.core.tensor_parallel import RowParallelLinear

    wrapper, adapter = bridge_modules()
    for number, layer in enumerate(model.decoder.layers):
        for ours in TARGETS:
            block, leaf = ours.split(".")
            inner = getattr(getattr(layer, block), leaf)
            made = adapter(
                inner.input_size, inner.output_size, RANK, base_linear_name=ours, activation="identity",
                input_is_parallel=isinstance(inner, RowParallelLinear), model_parallel_config=model.config,
                alpha=ALPHA,
            ).bfloat16()  # fmt: skip
            a, b = whole_factor(adapters, number, ours, config)
            with torch.no_grad():
                for module, whole in ((made.linear_in, a), (made.linear_out, b)):
                    key = f"{leaf}.weight" if module is made.linear_out else "linear_in.weight"
                    module.weight.copy_(sliced(key, whole, tuple(module.weight.shape), rank, asked.tp))
            setattr(getattr(layer, block), leaf, wrapper(inner, made))


def _save(folder: Path, model: Any, config: Any, asked: argparse.Namespace) -> None:
    import torch.distributed as dist
    from megatron.core import dist_checkpointing

    if asked.whole:
        _save_sharded(folder, [model], config, asked)
    else:
        held = model.sharded_state_dict(metadata=replicas())
        arguments = _arguments(config, asked)
        if asked.swift:
            from swift_lora import filtered

            state = filtered({"model": held, "iteration": 10})
            vars(arguments).update(
                tuner_type="lora", lora_rank=RANK, lora_alpha=float(ALPHA), lora_dropout=0.05, use_rslora=False
            )
        else:
            state = {"model": {k: v for k, v in held.items() if ".adapter." in k}, "iteration": 10}
        if dist.get_rank() == 0:
            folder.mkdir()
        dist.barrier()
        dist_checkpointing.save(state | {"args": arguments}, str(folder))
    if dist.get_rank() == 0 and not asked.swift:
        (folder / "run_config.yaml").write_text(f"peft:\n  dim: {RANK}\n  alpha: {ALPHA}\n")
    dist.barrier()


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--swift", action="store_true")
    parser.add_argument("--worker", action="store_true")
    parser.set_defaults(
        pp=1, ep=1, vpp=None, etp=None, first_stage=None, per_layer=False, critic=0, head_bias=False, no_args=False,
        optimizer=False,
    )  # fmt: skip
    asked = parser.parse_args()
    if not asked.worker:
        raise SystemExit(not launch(asked.tp, sys.argv))
    join()
    work(asked.out, asked)


if __name__ == "__main__":
    main()
