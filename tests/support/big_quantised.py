"""A Llama-3-70B as GPTQ, AWQ and NF4 lay it out: headers, holes, and what a look at the parts reads."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Iterator
from pathlib import Path

HIDDEN, INNER, LAYERS, VOCAB, KV = 8192, 28672, 80, 128256, 1024
GROUP, BLOCK = 128, 64
Tensor = tuple[str, str, tuple[int, ...], bytes]
"""Name, type, shape, and the first bytes; the rest is a hole."""

_BITS = {"BF16": 16, "F16": 16, "F32": 32, "I32": 32, "U8": 8}
_SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (KV, HIDDEN), "self_attn.v_proj": (KV, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}  # fmt: skip
_CONFIGS = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": True, "sym": True},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True},
    "nf4": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_compute_dtype": "bfloat16", "bnb_4bit_use_double_quant": True},
}  # fmt: skip
KINDS = tuple(_CONFIGS)
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""Source: bitsandbytes 0.50.2, functional.py."""


def llama_70b(folder: Path, kind: str) -> Path:
    """Ten files and their index."""
    folder.mkdir(parents=True)
    tensors = list(_tensors(kind))
    index, most = {}, -(-len(tensors) // 10)
    for number in range(10):
        file = f"model-{number + 1:05d}-of-00010.safetensors"
        part = tensors[number * most : (number + 1) * most]
        _write(folder / file, part)
        index |= {name: file for name, *_ in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
        "intermediate_size": INNER, "num_hidden_layers": LAYERS, "num_attention_heads": 64, "num_key_value_heads": 8,
        "vocab_size": VOCAB, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "quantization_config": _CONFIGS[kind],
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _tensors(kind: str) -> Iterator[Tensor]:
    yield "model.embed_tokens.weight", "BF16", (VOCAB, HIDDEN), b""
    for layer in range(LAYERS):
        for module, (out, inputs) in _SHAPES.items():
            parts = _nf4 if kind == "nf4" else _packed
            yield from parts(f"model.layers.{layer}.{module}", out, inputs, kind)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"model.layers.{layer}.{norm}.weight", "BF16", (HIDDEN,), b""
    yield "model.norm.weight", "BF16", (HIDDEN,), b""
    yield "lm_head.weight", "BF16", (VOCAB, HIDDEN), b""


def _packed(module: str, out: int, inputs: int, kind: str) -> Iterator[Tensor]:
    words = (inputs // 8, out) if kind == "gptq" else (inputs, out // 8)
    if kind == "gptq":
        order = random.Random(f"{module.rpartition('.')[0]} {inputs}").sample(range(inputs), inputs)
        yield f"{module}.g_idx", "I32", (inputs,), struct.pack(f"<{inputs}i", *(i // GROUP for i in order))
    yield f"{module}.qweight", "I32", words, b""
    yield f"{module}.qzeros", "I32", (inputs // GROUP, out // 8), b"\x77" * (inputs // GROUP * out // 2)
    yield f"{module}.scales", "F16", (inputs // GROUP, out), b""


def _nf4(module: str, out: int, inputs: int, kind: str) -> Iterator[Tensor]:
    weight, count = f"{module}.weight", out * inputs
    state = json.dumps(
        {"quant_type": "nf4", "blocksize": BLOCK, "dtype": "bfloat16", "shape": [out, inputs], "nested_blocksize": 256,
         "nested_dtype": "float32", "nested_offset": 0.05}
    ).encode()  # fmt: skip
    yield weight, "U8", (count // 2, 1), b""
    yield f"{weight}.absmax", "U8", (count // BLOCK,), b""
    yield f"{weight}.nested_absmax", "F32", (count // BLOCK // 256,), b""
    yield f"{weight}.nested_quant_map", "F32", (256,), struct.pack("<256f", *(i / 128 - 1 for i in range(256)))
    yield f"{weight}.quant_map", "F32", (16,), struct.pack("<16f", *NF4)
    yield f"{weight}.quant_state.bitsandbytes__nf4", "U8", (len(state),), state


def _write(file: Path, tensors: list[Tensor]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at, places = 0, []
    for name, dtype, shape, first in tensors:
        size = _BITS[dtype] // 8
        for length in shape:
            size *= length
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        places.append((at, first))
        at += size
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with file.open("wb") as out:
        out.write(struct.pack("<Q", len(raw)) + raw)
        out.truncate(8 + len(raw) + at)
        for begin, first in places:
            if first:
                out.seek(8 + len(raw) + begin)
                out.write(first)
