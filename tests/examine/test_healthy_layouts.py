"""Folders as they lie on the Hub and in its cache, with other files beside the weights, are healthy."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from healthy.findings import serious
from healthy.models import Saved, _sharded
from oracle.bases import edit_config, read_tensors, write_tensors

Tensors = dict[str, torch.Tensor]
Change = Callable[[Path], None]


def mistral(folder: Path) -> None:
    """Mistral's own file beside the shards of transformers."""
    save_file({"tok_embeddings.weight": torch.ones(2, 2)}, folder / "consolidated.safetensors", {"format": "pt"})
    (folder / "params.json").write_text("{}")
    (folder / "tekken.json").write_text("{}")


def gpt2(folder: Path) -> None:
    """The weights for each framework that there once was."""
    torch.save(read_tensors(folder), folder / "pytorch_model.bin")
    for name in ("tf_model.h5", "flax_model.msgpack", "64.tflite", "rust_model.ot"):
        (folder / name).write_bytes(b"x" * 50)
    (folder / "onnx").mkdir()
    (folder / "onnx" / "decoder_model.onnx").write_bytes(b"x")


def llama(folder: Path) -> None:
    """Meta's own files in a folder below."""
    (folder / "original").mkdir()
    torch.save({"a": torch.ones(1)}, folder / "original" / "consolidated.00.pth")
    (folder / "original" / "params.json").write_text("{}")


def trainer(folder: Path) -> None:
    """What a Trainer leaves to resume from."""
    for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state_0.pth"):
        (folder / name).write_bytes(b"x" * 30)
    (folder / "trainer_state.json").write_text("{}")


def pickled(folder: Path) -> None:
    """As transformers 4 saved: pickled, in two files with their index."""
    tensors = read_tensors(folder)
    for file in [*folder.glob("*.safetensors"), *folder.glob("*.index.json")]:
        file.unlink()
    names = [f"pytorch_model-0000{n}-of-00002.bin" for n in (1, 2)]
    places = {t: names[n % 2] for n, t in enumerate(tensors)}
    for name in names:
        torch.save({t: tensors[t] for t, place in places.items() if place == name}, folder / name)
    total = {"total_size": sum(t.nbytes for t in tensors.values())}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": total, "weight_map": places}))


def cached(folder: Path) -> None:
    """The Hub's cache: links to blobs; and somebody's link to the snapshot."""
    root = folder.parent / "models--me--m"
    blobs, snapshot = root / "blobs", root / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    shutil.move(folder, blobs)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    assert serious(snapshot, deep=True) == []
    folder.symlink_to(snapshot)


def tied_twice(folder: Path) -> None:
    """The output embedding stored though it is tied, as many repositories have it."""
    tensors = read_tensors(folder)
    write_tensors(folder, {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    edit_config(folder, tie_word_embeddings=True)


LAYOUTS: list[tuple[Change, str]] = [
    (mistral, "mistral"), (gpt2, "gpt2"), (llama, "llama"), (trainer, "qwen2"), (pickled, "llama"), (pickled, "gpt2"),
    (cached, "qwen2"), (tied_twice, "qwen2"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "kind"), LAYOUTS)
def test_what_lies_beside_the_weights_is_no_fault(change: Change, kind: str, tmp_path: Path) -> None:
    folder = Saved("causal", kind, _sharded).write(tmp_path / "model")
    change(folder)
    assert serious(folder, deep=True) == []


def gptq(name: str, weight: torch.Tensor) -> Tensors:
    rows, columns = weight.shape
    groups = columns // 8
    return {
        f"{name}.qweight": torch.ones(columns // 8, rows, dtype=torch.int32),
        f"{name}.qzeros": torch.ones(groups, rows // 8, dtype=torch.int32),
        f"{name}.scales": torch.ones(groups, rows),
        f"{name}.g_idx": torch.arange(columns, dtype=torch.int32) // 8,
    }


def fp8(name: str, weight: torch.Tensor) -> Tensors:
    return {f"{name}.weight": weight.to(torch.float8_e4m3fn), f"{name}.weight_scale_inv": torch.ones(1, 1)}


def packed(name: str, weight: torch.Tensor) -> Tensors:
    rows, columns = weight.shape
    return {
        f"{name}.weight_packed": torch.ones(rows, columns // 8, dtype=torch.int32),
        f"{name}.weight_scale": torch.ones(rows, 1),
        f"{name}.weight_shape": torch.tensor(weight.shape),
    }


INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "channel"}


@pytest.mark.parametrize(
    ("config", "change"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 8, "desc_act": False, "sym": True}, gptq),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, fp8),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "pack-quantized",
                "config_groups": {"group_0": {"targets": ["Linear"], "weights": INT4}},
            },
            packed,
        ),
    ],
    ids=["gptq", "fp8", "compressed-tensors"],
)
def test_a_quantised_model_is_no_fault(
    config: dict[str, Any], change: Callable[[str, torch.Tensor], Tensors], tmp_path: Path
) -> None:
    folder = Saved("causal", "llama").write(tmp_path / "model")
    made: Tensors = {}
    for name, weight in read_tensors(folder).items():
        made |= change(name.removesuffix(".weight"), weight) if "_proj.weight" in name else {name: weight}
    write_tensors(folder, made)
    edit_config(folder, quantization_config=config)
    assert serious(folder, deep=True) == []


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma2", "phi3"])
def test_a_model_beside_the_base_that_it_was_trained_from_is_healthy(kind: str, tmp_path: Path) -> None:
    rope = (("rope_parameters", {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6}),) if kind != "phi3" else ()
    base = Saved("causal", kind, more=rope).write(tmp_path / "base")
    model = Saved("seqcls", kind, more=rope).write(tmp_path / "reward")
    assert serious(model, base=str(base), deep=True) == []
