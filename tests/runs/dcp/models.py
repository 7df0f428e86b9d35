"""What `train.py` trains, and tensors that nothing trained, cut in every way."""

from __future__ import annotations

from typing import Any


def build(kind: str) -> tuple[Any, Any]:
    """A model and a function that gives its loss.

    Args:
        kind: `tiny` (no model of transformers), `reward`, `lm`, `lm-tied`, `lm-mixed` (bf16, norms in fp32),
            `lm-frozen-mlp` (embeddings and MLPs frozen), `lm-frozen-layer` (the whole layer frozen), `lora`,
            `lora-saved` (a head trained whole beside it).
    """
    import torch

    if kind == "tiny":
        tiny = torch.nn.Sequential(torch.nn.Embedding(5, 3), torch.nn.Linear(3, 2))
        return tiny, lambda module: module(torch.tensor([0, 3, 4])).pow(2).sum()
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    config = LlamaConfig(
        vocab_size=29, hidden_size=12, intermediate_size=20, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=32, pad_token_id=0, num_labels=1, bos_token_id=1,
        eos_token_id=2, tie_word_embeddings=kind == "lm-tied", use_cache=False,
    )  # fmt: skip
    causal = kind in ("lm", "lm-tied", "lm-mixed", "lm-frozen-mlp", "lm-frozen-layer", "lora", "lora-saved")
    model: Any = (LlamaForCausalLM if causal else LlamaForSequenceClassification)(config)
    model.config.architectures = [type(model).__name__]
    if kind == "lm-mixed":
        model = model.to(torch.bfloat16)
        for norm in (m for n, m in model.named_modules() if n.endswith("norm")):
            norm.float()
            norm.register_forward_hook(lambda module, given, out: out.to(torch.bfloat16))
    if kind.startswith("lm-frozen"):
        frozen = ("layers.0",) if kind == "lm-frozen-layer" else ("mlp", "embed_tokens")
        for name, parameter in model.named_parameters():
            parameter.requires_grad = not any(word in name for word in frozen)
    if kind.startswith("lora"):
        from peft import LoraConfig, get_peft_model

        saved = ["lm_head"] if kind == "lora-saved" else None
        lora = LoraConfig(
            r=2, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", modules_to_save=saved
        )
        model = get_peft_model(model, lora)

    def loss(module: Any) -> Any:
        tokens = torch.randint(3, 29, (2, 7))
        if causal:
            return module(input_ids=tokens, labels=tokens).loss
        return module(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits.float().pow(2).sum()

    return model, loss


def whole(tensor: Any) -> Any:
    """A tensor as it is over all ranks."""
    full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.detach().cpu().clone()


def odd_state(*, grid: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tensors of every type in shapes that divide by nothing, cut along each dimension, replicated, and none at all.

    Args:
        grid: over two dimensions of ranks, each of which cuts another dimension.
    """
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    ranks = dist.get_world_size()
    mesh = init_device_mesh("cpu", (2, ranks // 2) if grid else (ranks,))
    kinds = {
        "f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16, "f64": torch.float64, "i64": torch.int64,
        "u8": torch.uint8, "bool": torch.bool, "e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2,
    }  # fmt: skip
    shapes = {"matrix": (7, 5), "long": (11,), "few": (1, 3), "cube": (3, 5, 2)}
    state: dict[str, Any] = {}
    for kind, dtype in kinds.items():
        for shape_name, shape in shapes.items():
            if kind not in ("f32", "bf16") and (shape_name != "matrix" or grid):
                continue
            value = (torch.randn(shape, dtype=torch.float32) * 3).to(dtype)
            dims = (0,) if len(shape) == 1 or kind not in ("f32", "bf16") else (0, 1)
            for dim in dims:
                cut = [Shard(dim), Shard(1 - dim if len(shape) > 1 else 0)] if grid else [Shard(dim)]
                if kind in ("e4m3", "e5m2", "bool"):  # gloo moves none of these, so they are cut as bytes
                    pieces = distribute_tensor(value.view(torch.uint8), mesh, cut)
                    state[f"{kind}.{shape_name}.{dim}"] = pieces.view(dtype)
                else:
                    state[f"{kind}.{shape_name}.{dim}"] = distribute_tensor(value, mesh, cut)
    everywhere = [Replicate()] * (2 if grid else 1)
    state["replicated"] = distribute_tensor(torch.randn(4, 3), mesh, everywhere)
    state["single"] = torch.tensor(0.5)
    state["count"] = torch.tensor(9)
    state["none"] = torch.zeros(0, 4)
    state["plain"] = torch.arange(12.0).reshape(3, 4)
    state["turned"] = torch.arange(12.0).reshape(3, 4).t()
    found = {}
    for name, value in state.items():
        as_bytes = name.startswith(("e4m3", "e5m2", "bool"))
        found[f"live/{name}"] = whole(value.view(torch.uint8)).view(kinds[name[:4]]) if as_bytes else whole(value)
    return state, found
