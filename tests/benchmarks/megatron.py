"""How long `gather` plans a Megatron checkpoint shaped like DeepSeek-V3: 61 layers, 256 experts, 48 000 records.

python tests/benchmarks/megatron.py [--layers 61] [--experts 256] [--rounds 3] [--scratch DIR] [--no-plans]

Each record is one of torch.save, made once a shape and put into sparse files at its place: 1.3 TB by their sizes, about
1 GB on the disk. `.metadata` is torch's own, with the plans of ranks that megatron-core from 0.16 keeps in it (without
them after --no-plans). Needs torch; Megatron takes no part. Medians of wall and processor seconds.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle  # noqa: TID251
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HIDDEN, HEADS, VOCABULARY, DENSE, WIDTH, FFN = 7168, 128, 129280, 3, 2048, 18432
LATENT_Q, LATENT_KV, ROPE, NOPE, VALUE = 1536, 512, 64, 128, 128
TP, FILES = 8, 64
CONFIG = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "hidden_size": HIDDEN,
    "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "vocab_size": VOCABULARY, "q_lora_rank": LATENT_Q,
    "kv_lora_rank": LATENT_KV, "qk_rope_head_dim": ROPE, "qk_nope_head_dim": NOPE, "v_head_dim": VALUE,
    "intermediate_size": FFN, "moe_intermediate_size": WIDTH, "n_shared_experts": 1, "num_experts_per_tok": 8,
    "first_k_dense_replace": DENSE, "n_group": 8, "topk_group": 4, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "num_nextn_predict_layers": 0,
}  # fmt: skip


def tensors(layers: int, experts: int) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """Key, shape, and the shape of its pieces, as ranks of TP 8 with an expert a piece write them."""
    yield "embedding.word_embeddings.weight", (VOCABULARY, HIDDEN), (VOCABULARY // TP, HIDDEN)
    for n in range(layers):
        stem = f"decoder.layers.{n}."
        attention = stem + "self_attention."
        yield stem + "input_layernorm.weight", (HIDDEN,), (HIDDEN,)
        yield attention + "linear_q_down_proj.weight", (LATENT_Q, HIDDEN), (LATENT_Q, HIDDEN)
        yield attention + "linear_q_up_proj.layer_norm_weight", (LATENT_Q,), (LATENT_Q,)
        rows = HEADS * (NOPE + ROPE)
        yield attention + "linear_q_up_proj.weight", (rows, LATENT_Q), (rows // TP, LATENT_Q)
        rows = LATENT_KV + ROPE
        yield attention + "linear_kv_down_proj.weight", (rows, HIDDEN), (rows, HIDDEN)
        yield attention + "linear_kv_up_proj.layer_norm_weight", (LATENT_KV,), (LATENT_KV,)
        rows = HEADS * (NOPE + VALUE)
        yield attention + "linear_kv_up_proj.weight", (rows, LATENT_KV), (rows // TP, LATENT_KV)
        yield attention + "linear_proj.weight", (HIDDEN, HEADS * VALUE), (HIDDEN, HEADS * VALUE // TP)
        if n < DENSE:
            yield stem + "mlp.linear_fc1.layer_norm_weight", (HIDDEN,), (HIDDEN,)
            yield stem + "mlp.linear_fc1.weight", (2 * FFN, HIDDEN), (FFN // TP, HIDDEN)
            yield stem + "mlp.linear_fc2.weight", (HIDDEN, FFN), (HIDDEN, FFN // TP)
            continue
        yield stem + "pre_mlp_layernorm.weight", (HIDDEN,), (HIDDEN,)
        yield stem + "mlp.router.weight", (experts, HIDDEN), (experts, HIDDEN)
        yield stem + "mlp.router.expert_bias", (experts,), (experts,)
        yield stem + "mlp.experts.experts.linear_fc1.weight", (experts, 2 * WIDTH, HIDDEN), (1, WIDTH, HIDDEN)
        yield stem + "mlp.experts.experts.linear_fc2.weight", (experts, HIDDEN, WIDTH), (1, HIDDEN, WIDTH)
        yield stem + "mlp.shared_experts.linear_fc1.weight", (2 * WIDTH, HIDDEN), (WIDTH // TP, HIDDEN)
        yield stem + "mlp.shared_experts.linear_fc2.weight", (HIDDEN, WIDTH), (HIDDEN, WIDTH // TP)
    yield "decoder.final_layernorm.weight", (HIDDEN,), (HIDDEN,)
    yield "output_layer.weight", (VOCABULARY, HIDDEN), (VOCABULARY // TP, HIDDEN)


def offsets(shape: tuple[int, ...], piece: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Where pieces begin."""
    found: list[tuple[int, ...]] = [()]
    for size, step in zip(shape, piece, strict=True):
        found = [(*o, n) for o in found for n in range(0, size, step)]
    yield from found


class Records:
    """Files of ranks, filled with records one after the other; what is between headers is never written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ends = [0] * FILES
        self._made: dict[tuple[tuple[int, ...], Any], tuple[bytes, int, bytes]] = {}
        self._open = [os.open(folder / f"__{n}_0.distcp", os.O_CREAT | os.O_WRONLY) for n in range(FILES)]

    def add(self, number: int, shape: tuple[int, ...], dtype: Any) -> tuple[str, int, int]:
        """Another record; its file, offset and length."""
        head, hole, tail = self._template(shape, dtype)
        rank = number % FILES
        start = self.ends[rank]
        os.pwrite(self._open[rank], head, start)
        os.pwrite(self._open[rank], tail, start + len(head) + hole)
        length = len(head) + hole + len(tail)
        self.ends[rank] += length
        return f"__{rank}_0.distcp", start, length

    def _template(self, shape: tuple[int, ...], dtype: Any) -> tuple[bytes, int, bytes]:
        import torch

        if (shape, dtype) not in self._made:
            buffer = io.BytesIO()
            torch.save(torch.zeros(shape, dtype=dtype), buffer)
            raw = buffer.getvalue()
            with zipfile.ZipFile(io.BytesIO(raw)) as archive:
                (entry,) = (i for i in archive.infolist() if i.filename.endswith("/data/0"))
            names = struct.unpack("<HH", raw[entry.header_offset + 26 : entry.header_offset + 30])
            start = entry.header_offset + 30 + sum(names)
            self._made[shape, dtype] = raw[:start], entry.file_size, raw[start + entry.file_size :]
        return self._made[shape, dtype]


def write(folder: Path, layers: int, experts: int, *, plans: bool) -> int:
    """The checkpoint; the count of its records."""
    import torch
    from torch.distributed.checkpoint import metadata as meta
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

    folder.mkdir(parents=True)
    records = Records(folder)
    entries: dict[str, Any] = {}
    places: dict[Any, Any] = {}
    items: list[list[Any]] = [[] for _ in range(FILES)]
    count = 0
    for key, shape, piece in tensors(layers, experts):
        dtype = torch.float32 if key.endswith("expert_bias") else torch.bfloat16
        properties = meta.TensorProperties(dtype=dtype)
        chunks = []
        for offset in offsets(shape, piece):
            place = records.add(count, piece, dtype)
            chunk = meta.ChunkStorageMetadata(torch.Size(offset), torch.Size(piece))
            index = meta.MetadataIndex(key, torch.Size(offset), len(chunks))
            chunks.append(chunk)
            places[index] = _StorageInfo(*place)
            data = TensorWriteData(chunk, properties, torch.Size(shape))
            items[count % FILES].append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
            count += 1
        entries[key] = meta.TensorStorageMetadata(properties, torch.Size(shape), chunks)
    made = meta.Metadata(entries, None, places)
    if plans:
        made.all_local_plans = [SavePlan(each) for each in items]  # type: ignore[attr-defined]
    (folder / ".metadata").write_bytes(pickle.dumps(made))
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))
    config = CONFIG | {"num_hidden_layers": layers, "n_routed_experts": experts}
    (folder / "config.json").write_text(json.dumps(config))
    return count


def timed(command: list[str]) -> tuple[float, float, int]:
    """Wall seconds, processor seconds and peak kB of a command that has to end well."""
    begun = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{command[:4]} ended with {child.returncode}")
    return time.perf_counter() - begun, usage.ru_utime + usage.ru_stime, usage.ru_maxrss


def main() -> None:
    """Make the checkpoint, then plan it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=61)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-plans", action="store_true")
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--keep", action="store_true")
    asked = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="megatron-", dir=asked.scratch))
    try:
        folder = scratch / "iter_0000001"
        count = write(folder, asked.layers, asked.experts, plans=not asked.no_plans)
        size = (folder / ".metadata").stat().st_size
        print(f"{folder}: {count} records, .metadata of {size / 1e6:.1f} MB")
        command = [sys.executable, "-c", f"import converter; converter.gather({str(folder)!r})"]
        runs = [timed(command) for _ in range(asked.rounds or 1)]
        wall, cpu, peak = (statistics.median(r[n] for r in runs) for n in range(3))
        print(f"gather, planned: {wall:.1f} s wall, {cpu:.1f} s CPU, {peak / 1000:.0f} MB")
    finally:
        if not asked.keep:
            shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
