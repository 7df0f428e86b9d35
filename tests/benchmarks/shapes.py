"""Checkpoints of random values, made in a process of their own: a child's peak memory counts from its parent's.

python tests/benchmarks/shapes.py FOLDER --size 1.5B
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RANK = 16
BLOCK = 1 << 24
"""Random values made at once."""

SHARD = 5_000_000_000


@dataclass(frozen=True)
class Size:
    """A Qwen2 by its widths."""

    hidden: int
    inner: int
    kv: int
    vocab: int
    layers: int
    heads: int
    tied: bool

    def linears(self) -> Iterator[tuple[str, int, int]]:
        """Name, outputs and inputs of every linear layer."""
        hidden, inner, kv = self.hidden, self.inner, self.kv
        shapes = {
            "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }  # fmt: skip
        for layer in range(self.layers):
            for name, (out, inputs) in shapes.items():
                yield f"model.layers.{layer}.{name}", out, inputs

    def base(self, head: str | None) -> dict[str, tuple[int, ...]]:
        """Every tensor of the model; a tied output embedding is not there."""
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab, self.hidden)}
        for name, out, inputs in self.linears():
            shapes[f"{name}.weight"] = (out, inputs)
            if name.endswith(("q_proj", "k_proj", "v_proj")):
                shapes[f"{name}.bias"] = (out,)
        for layer in range(self.layers):
            for norm in ("input_layernorm", "post_attention_layernorm"):
                shapes[f"model.layers.{layer}.{norm}.weight"] = (self.hidden,)
        shapes["model.norm.weight"] = (self.hidden,)
        if head is not None:
            shapes[head] = (1, self.hidden)
        elif not self.tied:
            shapes["lm_head.weight"] = (self.vocab, self.hidden)
        return shapes

    def adapter(self) -> dict[str, tuple[int, ...]]:
        """Both factors of every linear layer, under PEFT's names."""
        shapes: dict[str, tuple[int, ...]] = {}
        for name, out, inputs in self.linears():
            shapes[f"base_model.model.{name}.lora_A.weight"] = (RANK, inputs)
            shapes[f"base_model.model.{name}.lora_B.weight"] = (out, RANK)
        return shapes

    def config(self, architecture: str) -> dict[str, Any]:
        """`config.json`."""
        return {
            "architectures": [architecture], "model_type": "qwen2", "hidden_size": self.hidden,
            "intermediate_size": self.inner, "num_hidden_layers": self.layers, "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv * self.heads // self.hidden, "vocab_size": self.vocab,
            "tie_word_embeddings": self.tied, "torch_dtype": "bfloat16", "rms_norm_eps": 1e-06,
            "rope_theta": 1000000.0, "max_position_embeddings": 32768, "hidden_act": "silu",
            "max_window_layers": self.layers, "pad_token_id": 0, "num_labels": 1,
        }  # fmt: skip


SIZES = {
    "0.2B": Size(1536, 8960, 256, 32000, 4, 12, True),
    "1.5B": Size(1536, 8960, 256, 151936, 28, 12, True),
    "7B": Size(3584, 18944, 512, 152064, 28, 28, False),
}


def write_random(path: Path, shapes: dict[str, tuple[int, ...]], dtype: str) -> None:
    """A safetensors file of normal values with deviation 0.02, block by block."""
    import torch

    torch_dtype, width = {"BF16": (torch.bfloat16, 2), "F32": (torch.float32, 4)}[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in shapes.items():
        size = width * torch.Size(shape).numel()
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    generator = torch.Generator().manual_seed(0)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for left in range(at // width, 0, -BLOCK):
            values = torch.randn(min(BLOCK, left), generator=generator).mul_(0.02).to(torch_dtype)
            file.write(memoryview(values.view(torch.uint8).numpy()))


def write_model(folder: Path, size: Size, *, head: str | None) -> None:
    """A model in files of 5 GB."""
    folder.mkdir(parents=True)
    groups: list[dict[str, tuple[int, ...]]] = [{}]
    held = 0
    for name, shape in size.base(head).items():
        nbytes = 2 * _count(shape)
        if groups[-1] and held + nbytes > SHARD:
            groups.append({})
            held = 0
        groups[-1][name] = shape
        held += nbytes
    files = [f"model-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)]
    if len(groups) == 1:
        files = ["model.safetensors"]
    else:
        index = {n: file for file, group in zip(files, groups, strict=True) for n in group}
        total = sum(2 * _count(s) for g in groups for s in g.values())
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=2)
        (folder / "model.safetensors.index.json").write_text(text + "\n")
    for file, group in zip(files, groups, strict=True):
        write_random(folder / file, group, "BF16")
    kind = "Qwen2ForCausalLM" if head is None else "Qwen2ForSequenceClassification"
    (folder / "config.json").write_text(json.dumps(size.config(kind), indent=2) + "\n")


def _count(shape: tuple[int, ...]) -> int:
    product = 1
    for n in shape:
        product *= n
    return product


def make(folder: Path, size: Size, *, reward: bool) -> None:
    """`base` and `adapter` in `folder`; `reward`: `rm`, a reward model, in place of them."""
    if reward:
        write_model(folder / "rm", size, head="score.weight")
        return
    write_model(folder / "base", size, head=None)
    adapter = folder / "adapter"
    adapter.mkdir()
    targets = sorted({name.rpartition(".")[2] for name, _, _ in size.linears()})
    lora = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": targets,
        "base_model_name_or_path": str(folder / "base"), "lora_dropout": 0.0, "bias": "none", "inference_mode": True,
    }  # fmt: skip
    (adapter / "adapter_config.json").write_text(json.dumps(lora, indent=2) + "\n")
    write_random(adapter / "adapter_model.safetensors", size.adapter(), "F32")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=SIZES, default="1.5B")
    parser.add_argument("--reward", action="store_true")
    given = parser.parse_args()
    make(given.folder, SIZES[given.size], reward=given.reward)
