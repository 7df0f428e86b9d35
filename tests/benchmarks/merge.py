"""An all-linear LoRA adapter (r=16) merged into a model shaped like Qwen2.5-1.5B: rlhf-convert, PEFT, a plain copy.

python tests/benchmarks/merge.py [--rounds 3] [--layers 28 56] [--scratch DIR] [--json FILE]

Three ways are run in turns, each in a fresh process, on a warm page cache and after a `sync`:

    rlhf-convert   `rlhf-convert merge-lora` with its defaults: every check on, the output on the disk when it ends
    peft           AutoModelForCausalLM, PeftModel, merge_and_unload, save_pretrained; what it wrote is not synced
    cp + sync      `cp -r` of the base model, then `sync`

and with them the start-up that rlhf-convert can't avoid: the interpreter plus `import torch`. Wall time and peak
resident memory are those of the process (`wait4`); medians over the rounds. The first number of layers is compared in
all ways; for further ones rlhf-convert runs alone, to show that its memory does not grow with the model.

The checkpoint takes 3.1 GB at 28 layers; three times that is needed in the scratch folder.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HIDDEN, INNER, KV, VOCAB, RANK = 1536, 8960, 256, 151936, 16
BLOCK = 1 << 24
"""Random values made at once while the checkpoint is written."""

PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
"""


# The checkpoint. Made in a process of its own: a child's peak memory counts from its parent's.


def linears(layers: int) -> Iterator[tuple[str, int, int]]:
    """Name, outputs and inputs of every linear layer."""
    shapes = {
        "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (KV, HIDDEN), "self_attn.v_proj": (KV, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN),
        "mlp.down_proj": (HIDDEN, INNER),
    }  # fmt: skip
    for layer in range(layers):
        for name, (out, inputs) in shapes.items():
            yield f"model.layers.{layer}.{name}", out, inputs


def base_shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """Every tensor of the base, as Qwen2.5-1.5B stores them: the output embedding is tied and not there."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for name, out, inputs in linears(layers):
        shapes[f"{name}.weight"] = (out, inputs)
        if name.endswith(("q_proj", "k_proj", "v_proj")):
            shapes[f"{name}.bias"] = (out,)
    for layer in range(layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{layer}.{norm}.weight"] = (HIDDEN,)
    return shapes | {"model.norm.weight": (HIDDEN,)}


def adapter_shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """Both factors of every linear layer, under PEFT's names."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, out, inputs in linears(layers):
        shapes[f"base_model.model.{name}.lora_A.weight"] = (RANK, inputs)
        shapes[f"base_model.model.{name}.lora_B.weight"] = (out, RANK)
    return shapes


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


def make(folder: Path, layers: int) -> None:
    """`base` and `adapter` in `folder`."""
    base, adapter = folder / "base", folder / "adapter"
    base.mkdir(parents=True)
    adapter.mkdir()
    config = {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": HIDDEN,
        "intermediate_size": INNER, "num_hidden_layers": layers, "num_attention_heads": 12, "num_key_value_heads": 2,
        "vocab_size": VOCAB, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0, "max_position_embeddings": 32768, "hidden_act": "silu", "max_window_layers": layers,
    }  # fmt: skip
    (base / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    targets = sorted({name.rpartition(".")[2] for name, _, _ in linears(1)})
    lora = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": targets,
        "base_model_name_or_path": str(base), "lora_dropout": 0.0, "bias": "none", "inference_mode": True,
    }  # fmt: skip
    (adapter / "adapter_config.json").write_text(json.dumps(lora, indent=2) + "\n")
    write_random(base / "model.safetensors", base_shapes(layers), "BF16")
    write_random(adapter / "adapter_model.safetensors", adapter_shapes(layers), "F32")


# The runs


@dataclass(frozen=True)
class Run:
    """One process: seconds of wall time and of processor time, and its peak resident bytes."""

    wall: float
    cpu: float
    peak: int


def timed(command: list[str], *, sync: bool = False) -> Run:
    """Run a command to its end; `sync`: with what it wrote brought to the disk."""
    subprocess.run(["sync"], check=True)
    begun = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert child.stderr is not None
    said = child.stderr.read()
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{command[0]} ended with {child.returncode}:\n{said.decode(errors='replace')}")
    if sync:
        subprocess.run(["sync"], check=True)
    return Run(time.perf_counter() - begun, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def warm(folder: Path) -> None:
    """Bring the inputs into the page cache."""
    for path in folder.rglob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 24):
                pass


def commands(folder: Path) -> dict[str, list[str]]:
    """The ways that are compared; each writes `out`."""
    base, adapter, out = (str(folder / name) for name in ("base", "adapter", "out"))
    program = str(Path(sys.executable).with_name("rlhf-convert"))
    return {
        "start-up": [sys.executable, "-c", "import torch"],
        "rlhf-convert": [program, "merge-lora", adapter, out, "--base", base],
        "peft": [sys.executable, "-c", PEFT, base, adapter, out],
        "cp + sync": ["cp", "-r", base, out],
    }


def compare(folder: Path, rounds: int, ways: list[str]) -> dict[str, list[Run]]:
    """All ways in turns, `rounds` times."""
    found: dict[str, list[Run]] = {way: [] for way in ways}
    timed(commands(folder)["start-up"])  # byte code and libraries into the cache
    for _ in range(rounds):
        for way in ways:
            warm(folder)
            found[way].append(timed(commands(folder)[way], sync=way == "cp + sync"))
            shutil.rmtree(folder / "out", ignore_errors=True)
            print(f"  {way:<13} {found[way][-1].wall:7.2f} s", file=sys.stderr, flush=True)
    return found


def median(runs: list[Run], what: str) -> float:
    """The median of one figure."""
    return statistics.median(getattr(r, what) for r in runs)


def table(runs: dict[str, list[Run]]) -> list[str]:
    """One line a way."""
    lines = [f"{'':<13} {'wall s':>8} {'min-max':>13} {'cpu s':>8} {'peak MB':>8}"]
    for way, found in runs.items():
        walls = [r.wall for r in found]
        lines.append(
            f"{way:<13} {median(found, 'wall'):8.2f} {min(walls):6.2f}-{max(walls):6.2f} {median(found, 'cpu'):8.2f} "
            f"{median(found, 'peak') / 1e6:8.0f}"
        )
    return lines


def ratios(runs: dict[str, list[Run]]) -> dict[str, float]:
    """The figures that are aimed at: 0.25, 1 and 450 at most."""
    wall = {way: median(found, "wall") for way, found in runs.items()}
    return {
        "of PEFT's wall time": wall["rlhf-convert"] / wall["peft"],
        "of 2 x (cp + sync) + start-up": wall["rlhf-convert"] / (2 * wall["cp + sync"] + wall["start-up"]),
        "MB peak memory": median(runs["rlhf-convert"], "peak") / 1e6,
    }


def main() -> None:
    """Prints a table and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, nargs="+", default=[28])
    parser.add_argument("--scratch", type=Path, help="a folder on the disk to measure")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.make is not None:
        make(given.make, given.layers[0])
        return
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=given.scratch) as scratch:
        for number, layers in enumerate(given.layers):
            folder = Path(scratch) / str(layers)
            subprocess.run([sys.executable, __file__, "--make", folder, "--layers", str(layers)], check=True)
            size = sum(p.stat().st_size for p in (folder / "base").iterdir())
            ways = list(commands(folder)) if number == 0 else ["start-up", "rlhf-convert"]
            runs = compare(folder, given.rounds, ways)
            shutil.rmtree(folder)
            print(
                f"\n{layers} layers, {size / 1e9:.2f} GB, {len(os.sched_getaffinity(0))} cores, {given.rounds} rounds"
            )
            print("\n".join(table(runs)))
            figures = ratios(runs) if number == 0 else {"MB peak memory": median(runs["rlhf-convert"], "peak") / 1e6}
            print("\n".join(f"{value:8.2f} {what}" for what, value in figures.items()))
            result[str(layers)] = {
                "bytes": size, "runs": {w: [vars(r) for r in found] for w, found in runs.items()}, "ratios": figures,
            }  # fmt: skip
    if given.json is not None:
        given.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
