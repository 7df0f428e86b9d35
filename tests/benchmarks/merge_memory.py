"""Memory of merges that have much in one tensor: LoRA over 128 experts, in three layouts, and a base in FP8 blocks.

python tests/benchmarks/merge_memory.py [--layers 2] [--fp8-layers 9] [--scratch DIR] [--only NAME]

    one by one     a Qwen3-MoE layer shape (128 experts, 2048 x 768), each expert a tensor, a pair for all of them
    stacked        the same experts in two tensors a layer
    apart          a pair for each expert, over single experts
    fp8            a Llama-shaped base in FP8 blocks of 128 x 128, `--dequantize`, LoRA on every linear layer
    fp8 same       the same with `--requantize same`

Printed are wall seconds and the peak of RssAnon, sampled from /proc: pages of mapped files, which the system can drop,
are not in it. The bound of the issue is 450 MB.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

BOUND = 450
EXPERTS, HIDDEN, INNER, RANK = 128, 2048, 768, 16
FP8_HIDDEN, FP8_INNER, FP8_VOCAB = 4096, 14336, 32000
SAMPLE_SECONDS = 0.004
BLOCK = 1 << 22
"""Values of noise that are made once and written again and again."""

Shapes = dict[str, tuple[tuple[int, ...], str]]
"""Shape and dtype by name; the values are noise."""


def write(path: Path, shapes: Shapes) -> None:
    """A safetensors file of noise; no value is NaN."""
    import numpy as np

    widths = {"BF16": 2, "F32": 4, "F8_E4M3": 1}
    header: dict[str, Any] = {}
    at = 0
    for name, (shape, dtype) in shapes.items():
        size = int(np.prod(shape)) * widths[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    noise = np.random.default_rng(0)
    values = noise.standard_normal(BLOCK, dtype=np.float32) * 0.02
    blocks = {
        "BF16": (values.view(np.uint32) >> 16).astype(np.uint16).tobytes(),
        "F32": (np.abs(values) + 1e-3).tobytes(),  # scales are above zero; for factors any numbers do
        "F8_E4M3": (noise.integers(0, 240, BLOCK, dtype=np.uint8) & 0xF7).tobytes(),
    }
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for shape, dtype in shapes.values():
            left = int(np.prod(shape)) * widths[dtype]
            while left:
                left -= file.write(blocks[dtype][: min(left, len(blocks[dtype]))])


def moe_base(folder: Path, layers: int, *, stacked: bool) -> None:
    shapes: Shapes = {"model.embed_tokens.weight": ((1000, HIDDEN), "BF16"), "lm_head.weight": ((1000, HIDDEN), "BF16")}
    shapes["model.norm.weight"] = ((HIDDEN,), "BF16")
    for layer in range(layers):
        stem = f"model.layers.{layer}"
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{stem}.{name}.weight"] = ((HIDDEN,), "BF16")
        for name, rows, columns in (("q", 4096, HIDDEN), ("k", 512, HIDDEN), ("v", 512, HIDDEN), ("o", HIDDEN, 4096)):
            shapes[f"{stem}.self_attn.{name}_proj.weight"] = ((rows, columns), "BF16")
        for name in ("q_norm", "k_norm"):
            shapes[f"{stem}.self_attn.{name}.weight"] = ((128,), "BF16")
        shapes[f"{stem}.mlp.gate.weight"] = ((EXPERTS, HIDDEN), "BF16")
        if stacked:
            shapes[f"{stem}.mlp.experts.gate_up_proj"] = ((EXPERTS, 2 * INNER, HIDDEN), "BF16")
            shapes[f"{stem}.mlp.experts.down_proj"] = ((EXPERTS, HIDDEN, INNER), "BF16")
            continue
        for expert in range(EXPERTS):
            for name, shape in (("gate", (INNER, HIDDEN)), ("up", (INNER, HIDDEN)), ("down", (HIDDEN, INNER))):
                shapes[f"{stem}.mlp.experts.{expert}.{name}_proj.weight"] = (shape, "BF16")
    folder.mkdir(parents=True)
    write(folder / "model.safetensors", shapes)
    config = {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": HIDDEN,
        "num_hidden_layers": layers, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
        "intermediate_size": INNER, "moe_intermediate_size": INNER, "num_experts": EXPERTS, "num_experts_per_tok": 8,
        "vocab_size": 1000, "tie_word_embeddings": False, "dtype": "bfloat16", "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


def moe_adapter(folder: Path, base: Path, layers: int, *, apart: bool) -> None:
    shapes: Shapes = {}

    def pair(module: str, rank: int, columns: int, rows: int) -> None:
        shapes[f"base_model.model.{module}.lora_A.weight"] = ((rank, columns), "F32")
        shapes[f"base_model.model.{module}.lora_B.weight"] = ((rows, rank), "F32")

    for layer in range(layers):
        experts = f"model.layers.{layer}.mlp.experts"
        if apart:
            for e in range(EXPERTS):
                pair(f"{experts}.{e}.gate_proj", RANK, HIDDEN, INNER)
                pair(f"{experts}.{e}.up_proj", RANK, HIDDEN, INNER)
                pair(f"{experts}.{e}.down_proj", RANK, INNER, HIDDEN)
        else:
            pair(f"{experts}.base_layer", RANK * EXPERTS, HIDDEN, 2 * INNER)
            pair(experts, RANK * EXPERTS, INNER, HIDDEN)
    targets: dict[str, Any] = {"target_modules": ["gate_proj", "up_proj", "down_proj"]}
    if not apart:
        targets = {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    _adapter(folder, base, shapes, targets | {"peft_version": "0.21.2"})


def _adapter(folder: Path, base: Path, shapes: Shapes, more: dict[str, Any]) -> None:
    folder.mkdir(parents=True)
    write(folder / "adapter_model.safetensors", shapes)
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base), "r": RANK}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 2 * RANK} | more))


def llama(layers: int) -> Iterator[tuple[str, int, int]]:
    """Name, outputs and inputs of every linear layer."""
    for layer in range(layers):
        for name, rows, columns in (
            ("self_attn.q_proj", FP8_HIDDEN, FP8_HIDDEN), ("self_attn.k_proj", 1024, FP8_HIDDEN),
            ("self_attn.v_proj", 1024, FP8_HIDDEN), ("self_attn.o_proj", FP8_HIDDEN, FP8_HIDDEN),
            ("mlp.gate_proj", FP8_INNER, FP8_HIDDEN), ("mlp.up_proj", FP8_INNER, FP8_HIDDEN),
            ("mlp.down_proj", FP8_HIDDEN, FP8_INNER),
        ):  # fmt: skip
            yield f"model.layers.{layer}.{name}", rows, columns


def fp8_base(folder: Path, layers: int) -> None:
    table = (FP8_VOCAB, FP8_HIDDEN)
    shapes: Shapes = {"model.embed_tokens.weight": (table, "BF16"), "lm_head.weight": (table, "BF16")}
    shapes["model.norm.weight"] = ((FP8_HIDDEN,), "BF16")
    for layer in range(layers):
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{layer}.{name}.weight"] = ((FP8_HIDDEN,), "BF16")
    for name, rows, columns in llama(layers):
        shapes[f"{name}.weight"] = ((rows, columns), "F8_E4M3")
        shapes[f"{name}.weight_scale_inv"] = ((rows // 128, columns // 128), "F32")
    folder.mkdir(parents=True)
    write(folder / "model.safetensors", shapes)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": FP8_HIDDEN,
        "num_hidden_layers": layers, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "intermediate_size": FP8_INNER, "vocab_size": FP8_VOCAB, "tie_word_embeddings": False, "dtype": "bfloat16",
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


def fp8_adapter(folder: Path, base: Path, layers: int) -> None:
    shapes: Shapes = {}
    for name, rows, columns in llama(layers):
        shapes[f"base_model.model.{name}.lora_A.weight"] = ((RANK, columns), "F32")
        shapes[f"base_model.model.{name}.lora_B.weight"] = ((rows, RANK), "F32")
    _adapter(folder, base, shapes, {"target_modules": "all-linear"})


def timed(command: list[str]) -> tuple[float, float]:
    """Wall seconds and the peak of RssAnon in MB.

    Raises:
        RuntimeError: the command failed.
    """
    begun = time.monotonic()
    with tempfile.TemporaryFile("w+") as said:
        child = subprocess.Popen(command, stdout=said, stderr=said)
        peak = [0]
        watcher = threading.Thread(target=_watch, args=(child, peak))
        watcher.start()
        code = child.wait()
        watcher.join()
        said.seek(0)
        if code:
            raise RuntimeError(said.read()[-2000:])
    return time.monotonic() - begun, peak[0] / 1e6


def _watch(child: subprocess.Popen[bytes], peak: list[int]) -> None:
    while child.poll() is None:
        try:
            text = Path(f"/proc/{child.pid}/status").read_text()
        except OSError:
            return
        held = [int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("RssAnon:")]
        peak[0] = max(peak[0], *held, 0)
        time.sleep(SAMPLE_SECONDS)


def cases(scratch: Path, layers: int, fp8_layers: int) -> dict[str, Callable[[], list[str]]]:
    """What each case makes, and the arguments of its merge."""

    def moe(*, stacked: bool, apart: bool) -> list[str]:
        moe_base(scratch / "base", layers, stacked=stacked)
        moe_adapter(scratch / "adapter", scratch / "base", layers, apart=apart)
        return []

    def fp8(*options: str) -> list[str]:
        fp8_base(scratch / "base", fp8_layers)
        fp8_adapter(scratch / "adapter", scratch / "base", fp8_layers)
        return list(options)

    return {
        "one by one": lambda: moe(stacked=False, apart=False),
        "stacked": lambda: moe(stacked=True, apart=False),
        "apart": lambda: moe(stacked=False, apart=True),
        "fp8": lambda: fp8("--dequantize"),
        "fp8 same": lambda: fp8("--requantize", "same"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2, help="of the mixtures: 1.2 GB each")
    parser.add_argument("--fp8-layers", type=int, default=32, help="of the FP8 base: 0.22 GB each, and 0.5 GB beside")
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--only")
    asked = parser.parse_args()
    over = []
    print(f"{'':<12} {'base GB':>8} {'wall s':>8} {'RssAnon MB':>11}")
    with tempfile.TemporaryDirectory(dir=asked.scratch) as folder:
        for name, make in cases(Path(folder), asked.layers, asked.fp8_layers).items():
            if asked.only not in (None, name):
                continue
            scratch = Path(folder)
            options = make()
            size = (scratch / "base" / "model.safetensors").stat().st_size / 1e9
            arguments = [str(scratch / "adapter"), str(scratch / "out"), "--base", str(scratch / "base"), *options]
            wall, anon = timed([sys.executable, "-m", "converter", "merge-lora", *arguments])
            print(f"{name:<12} {size:8.2f} {wall:8.1f} {anon:11.0f}", flush=True)
            over += [name] if anon > BOUND else []
            for part in ("base", "adapter", "out"):
                shutil.rmtree(scratch / part)
    if over:
        sys.exit(f"over {BOUND} MB: {', '.join(over)}")


if __name__ == "__main__":
    main()
