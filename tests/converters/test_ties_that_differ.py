"""Embeddings that config.json ties and whose stored copies differ: loaders of today keep both, and so do we."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import heads_zoo as zoo
from heads_run import base_of, opened, remapped, written
from oracle.command import run

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def tied_by_config(folder: Path, tensors: dict[str, torch.Tensor], **config: object) -> Path:
    """The folder with other tensors, and a config that ties."""
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": True} | config))
    return folder


def config_of(folder: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((folder / "config.json").read_text())
    return found


def test_a_merge_that_replaces_one_of_two_that_differ_leaves_the_other(tmp_path: Path) -> None:
    base = base_of(zoo.live("llama", torch.float32), tmp_path / "base")
    given = load_file(base / "model.safetensors")
    given[HEAD] = given[EMBEDDING] + 1
    tied_by_config(base, given)
    new = given[EMBEDDING] * 3
    layer = "base_model.model.model.layers.0.self_attn.q_proj"
    hidden = given["model.layers.0.self_attn.q_proj.weight"].shape
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file(
        {
            "base_model.model.model.embed_tokens.weight": new,
            f"{layer}.lora_A.weight": torch.ones(2, hidden[1]),
            f"{layer}.lora_B.weight": torch.ones(hidden[0], 2),
        },
        adapter / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"layers_to_transform": [0]}))
    ran = run("merge-lora", adapter, tmp_path / "out", "--base", base)
    assert ran.code == 0, ran.err
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(found[EMBEDDING], new)
    assert torch.equal(found[HEAD], given[HEAD])
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is False
    assert "tied-differ" in ran.text


def test_a_head_written_over_a_model_with_two_that_differ_keeps_both(tmp_path: Path) -> None:
    model = zoo.live("llama", torch.float32)
    source = zoo.save(zoo.FORMS["hf-seqcls"], model, tmp_path / "rm")
    given = load_file(source / "model.safetensors")
    for name, offset in (("differ", 1.0), ("equal", 0.0)):
        tensors = given | {HEAD: given[EMBEDDING] + offset}
        folder = zoo.save(zoo.FORMS["hf-seqcls"], model, tmp_path / name)
        tied_by_config(folder, tensors)
        out = written(remapped(opened(folder), "trl-vhead"), tmp_path / f"{name}-out")
        found = load_file(out / "model.safetensors")
        assert torch.equal(found[EMBEDDING], given[EMBEDDING])
        assert (HEAD in found) == (name == "differ")
        assert config_of(out)["tie_word_embeddings"] is (name == "equal")
        if name == "differ":
            assert torch.equal(found[HEAD], tensors[HEAD])
