"""Folders shaped like large models whose weight files are headers and holes: nothing of their size is on disk."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

HIDDEN, INNER, LAYERS, VOCAB, KV = 8192, 28672, 80, 128256, 1024
SHARD_BYTES = 5_000_000_000


def llama_70b(folder: Path) -> Path:
    """A Llama-3-70B in bf16: 723 tensors, 141 GB in 30 files, as `save_pretrained` lays it out."""
    folder.mkdir(parents=True)
    _write_weights(folder, list(_tensors()))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": VOCAB,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return folder


def deepseek_671b(folder: Path) -> Path:
    """A DeepSeek-V3 in bf16, 256 experts a layer, each a tensor of its own: 45,000 tensors, 1.3 TB."""
    folder.mkdir(parents=True)
    _write_weights(folder, list(_mixture()))
    config = {
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "hidden_size": 7168,
        "intermediate_size": 18432, "moe_intermediate_size": 2048, "num_hidden_layers": 61, "n_routed_experts": 256,
        "n_shared_experts": 1, "first_k_dense_replace": 3, "moe_layer_freq": 1, "num_attention_heads": 128,
        "num_key_value_heads": 128, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "q_lora_rank": 1536,
        "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128, "vocab_size": 129280,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "num_nextn_predict_layers": 0,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return folder


def adapter_on_experts(folder: Path, base: Path) -> Path:
    """A LoRA adapter, r=8, with a pair of factors for each expert of `deepseek_671b`: 89,000 tensors."""
    folder.mkdir(parents=True)
    pairs: list[tuple[str, tuple[int, ...]]] = []
    for name, (out, inputs) in _experts():
        stem = "base_model.model." + name.removesuffix(".weight")
        pairs += [(f"{stem}.lora_A.weight", (8, inputs)), (f"{stem}.lora_B.weight", (out, 8))]
    _write_shard(folder / "adapter_model.safetensors", pairs)
    lora = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 16, "bias": "none", "lora_dropout": 0.0,
        "target_modules": "all-linear", "base_model_name_or_path": str(base), "inference_mode": True,
    }  # fmt: skip
    lora["target_modules"] = r".*\.mlp\.experts\.\d+\.(gate|up|down)_proj"
    (folder / "adapter_config.json").write_text(json.dumps(lora, indent=2) + "\n")
    return folder


def _mixture() -> Iterator[tuple[str, tuple[int, ...]]]:
    experts = dict(_experts())
    yield "model.embed_tokens.weight", (129280, 7168)
    for layer in range(61):
        prefix = f"model.layers.{layer}."
        yield prefix + "self_attn.q_a_proj.weight", (1536, 7168)
        yield prefix + "self_attn.q_a_layernorm.weight", (1536,)
        yield prefix + "self_attn.q_b_proj.weight", (128 * 192, 1536)
        yield prefix + "self_attn.kv_a_proj_with_mqa.weight", (576, 7168)
        yield prefix + "self_attn.kv_a_layernorm.weight", (512,)
        yield prefix + "self_attn.kv_b_proj.weight", (128 * 256, 512)
        yield prefix + "self_attn.o_proj.weight", (7168, 128 * 128)
        if layer < 3:
            yield prefix + "mlp.gate_proj.weight", (18432, 7168)
            yield prefix + "mlp.up_proj.weight", (18432, 7168)
            yield prefix + "mlp.down_proj.weight", (7168, 18432)
        else:
            yield prefix + "mlp.gate.weight", (256, 7168)
            yield prefix + "mlp.gate.e_score_correction_bias", (256,)
            for part in ("gate", "up", "down"):
                name = f"{prefix}mlp.shared_experts.{part}_proj.weight"
                yield name, experts[f"{prefix}mlp.experts.0.{part}_proj.weight"]
            for expert in range(256):
                for part in ("gate", "up", "down"):
                    name = f"{prefix}mlp.experts.{expert}.{part}_proj.weight"
                    yield name, experts[name]
        yield prefix + "input_layernorm.weight", (7168,)
        yield prefix + "post_attention_layernorm.weight", (7168,)
    yield "model.norm.weight", (7168,)
    yield "lm_head.weight", (129280, 7168)


def _experts() -> Iterator[tuple[str, tuple[int, int]]]:
    shapes = {"gate": (2048, 7168), "up": (2048, 7168), "down": (7168, 2048)}
    for layer in range(3, 61):
        for expert in range(256):
            for part, shape in shapes.items():
                yield f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight", shape


def _write_weights(folder: Path, named: list[tuple[str, tuple[int, ...]]]) -> None:
    """Files of 5 GB with their index."""
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    size = 0
    for name, shape in named:
        nbytes = _bytes(shape)
        if shards[-1] and size + nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append((name, shape))
        size += nbytes
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= {name: file for name, _ in tensors}
        _write_shard(folder / file, tensors)
    total = sum(_bytes(shape) for _, shape in named)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _tensors() -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "model.embed_tokens.weight", (VOCAB, HIDDEN)
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        yield prefix + "self_attn.q_proj.weight", (HIDDEN, HIDDEN)
        yield prefix + "self_attn.k_proj.weight", (KV, HIDDEN)
        yield prefix + "self_attn.v_proj.weight", (KV, HIDDEN)
        yield prefix + "self_attn.o_proj.weight", (HIDDEN, HIDDEN)
        yield prefix + "mlp.gate_proj.weight", (INNER, HIDDEN)
        yield prefix + "mlp.up_proj.weight", (INNER, HIDDEN)
        yield prefix + "mlp.down_proj.weight", (HIDDEN, INNER)
        yield prefix + "input_layernorm.weight", (HIDDEN,)
        yield prefix + "post_attention_layernorm.weight", (HIDDEN,)
    yield "model.norm.weight", (HIDDEN,)
    yield "lm_head.weight", (VOCAB, HIDDEN)


def _bytes(shape: tuple[int, ...]) -> int:
    count = 2
    for extent in shape:
        count *= extent
    return count


def _write_shard(path: Path, tensors: list[tuple[str, tuple[int, ...]]]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in tensors:
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + _bytes(shape)]}
        at += _bytes(shape)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
