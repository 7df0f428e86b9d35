"""Layers for multi-token prediction: `mtp.layers.K` of Megatron's, and the layers after the last of published models.

The layer is that of a model of transformers with one layer more; megatron-core's own saves of it are compared by
tests/runs/run_mcore_matrix.py.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

from mcore.compare import written
from mcore.models import built, in_megatron, next_tokens
from oracle.command import run
from zero.compare import differences


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DeepSeek-V3 as it is published, with copies of the embeddings in the layer after the last."""
    folder = tmp_path_factory.mktemp("deepseek")
    built("deepseek_v3-mtp").save_pretrained(folder)
    held = load_file(folder / "model.safetensors") | next_tokens("deepseek_v3-mtp")
    held["model.layers.2.embed_tokens.weight"] = held["model.embed_tokens.weight"].clone()
    held["model.layers.2.shared_head.head.weight"] = held["lm_head.weight"].clone()
    save_file(held, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def release(model: Path) -> Path:
    out = model.parent / "megatron"
    done = run("convert", model, out, "--to", "megatron", "--role", "actor")
    assert done.code == 0, done.err
    return out


def test_they_are_written_under_megatron_s_keys(model: Path, release: Path) -> None:
    reader = FileSystemReader(release / "release")
    entries = reader.read_metadata().state_dict_metadata
    have = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata) and key.startswith("mtp.")
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, that one process loads alone
        _load_state_dict(have, reader, no_dist=True)
    wanted = in_megatron(load_file(model / "model.safetensors"), built("deepseek_v3-mtp").config)
    assert torch.equal(have["mtp.layers.0.eh_proj.weight"], wanted["mtp.layers.0.eh_proj.weight"])
    stem = "mtp.layers.0.transformer_layer."
    names = {"self_attention.linear_kv_down_proj.weight", "mlp.shared_experts.linear_fc1.weight", "mlp.router.weight"}
    for name in names:
        assert torch.equal(have[stem + name], wanted[stem + name])
    experts = have[f"{stem}mlp.experts.experts.linear_fc1.weight"]
    for number in range(4):
        local = f"{stem}mlp.experts.local_experts.{number}.linear_fc1.weight"
        assert torch.equal(experts[number], wanted[local])


def test_they_come_back_with_the_copies_that_models_are_published_with(
    model: Path, release: Path, tmp_path: Path
) -> None:
    done = run("gather", release, tmp_path / "back")
    assert done.code == 0, done.err
    assert differences(written(tmp_path / "back"), load_file(model / "model.safetensors")) == []


def test_they_are_left_out_with_consent_where_config_json_has_none(model: Path, release: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    held = {n: t for n, t in load_file(model / "model.safetensors").items() if not n.startswith("model.layers.2.")}
    save_file(held, base / "model.safetensors", {"format": "pt"})
    config = json.loads((release / "config.json").read_text()) | {"num_nextn_predict_layers": 0}
    (base / "config.json").write_text(json.dumps(config))
    (release / "config.json").rename(release / "kept.json")
    try:
        done = run("gather", release, tmp_path / "back", "--base", base)
    finally:
        (release / "kept.json").rename(release / "config.json")
    assert done.code == 3
    assert "megatron-mtp" in done.text


def test_an_embedding_that_differs_from_its_copy_is_refused(model: Path, tmp_path: Path) -> None:
    held = load_file(model / "model.safetensors")
    held["model.layers.2.embed_tokens.weight"][5] += 1
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_bytes((model / "config.json").read_bytes())
    save_file(held, tmp_path / "hf" / "model.safetensors", {"format": "pt"})
    done = run("convert", tmp_path / "hf", tmp_path / "out", "--to", "megatron", "--role", "actor")
    assert done.code == 3
    assert "model.layers.2.embed_tokens.weight differs from model.embed_tokens.weight" in done.text
