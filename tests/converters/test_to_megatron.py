"""`convert --to megatron`: torch's own reader finds what `mcore/models.py` puts into Megatron's modules, bit by bit.

That megatron-core loads it at TP 1 and 2, PP 1 and 2, EP 2 is compared by tests/runs/run_mcore_written.py.
"""

from __future__ import annotations

import argparse
import json
import re
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

from mcore.compare import RUNS, oracle, written
from mcore.models import built, in_megatron
from oracle.command import run
from zero.compare import differences

CRITIC = RUNS / "qwen3-critic-tp2"
ROUND_TRIPS = ("qwen2-tied", "qwen3_moe", "deepseek_v3")
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"(.+\.experts)\.local_experts\.(\d+)\.(.+)")


def _model(tmp_path: Path, case: str) -> Path:
    built(case).save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


def _read_by_torch(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a distributed checkpoint, whole, as torch reads it."""
    reader = FileSystemReader(folder)
    entries = reader.read_metadata().state_dict_metadata
    found = {
        key: torch.full(entry.size, 9.0).to(entry.properties.dtype)
        for key, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, that one process loads alone
        _load_state_dict(found, reader, no_dist=True)
    return found


def _stacked(model: Path, config: object, *, has_experts: bool) -> dict[str, torch.Tensor]:
    """What runs on GPUs have: layers and experts stacked, norms inside of the matrices behind them."""
    groups: dict[str, list[torch.Tensor]] = {}
    found: dict[str, torch.Tensor] = {}
    experts: dict[str, list[torch.Tensor]] = {}
    for name, tensor in in_megatron(load_file(model / "model.safetensors"), config).items():
        if match := _EXPERT.fullmatch(name):
            experts.setdefault(f"{match[1]}.experts.{match[3]}", []).append(tensor)
        else:
            found[name] = tensor
    for name, tensor in list((found | {n: torch.stack(t) for n, t in experts.items()}).items()):
        if match := _LAYER.fullmatch(name):
            found.pop(name, None)
            rest = match[2].replace("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight")
            if not has_experts:
                rest = rest.replace("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight")
            groups.setdefault(f"decoder.layers.{rest}", []).append(tensor)
    return found | {n: torch.stack(t) for n, t in groups.items()}


@pytest.mark.parametrize("case", ["qwen2-tied", "qwen3_moe"])
def test_torch_reads_what_megatron_s_modules_hold(tmp_path: Path, case: str) -> None:
    model, out = _model(tmp_path, case), tmp_path / "out"
    done = run("convert", model, out, "--to", "megatron", "--role", "actor", "--tp", "2")
    assert done.code == 0, done.err
    have, wanted = _read_by_torch(out / "release"), _stacked(model, built(case).config, has_experts="moe" in case)
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        if name in wanted:
            assert have[name].shape[0] == 256
            assert not have[name][99:].any()
            have[name], wanted[name] = have[name][:99], wanted[name][:99]
    assert differences(have, wanted) == []


def test_a_loader_finds_the_release_and_pieces_of_one_layer_and_one_expert(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("convert", _model(tmp_path, "qwen3_moe"), out, "--to", "megatron", "--role", "actor").code == 0
    assert (out / "latest_checkpointed_iteration.txt").read_text() == "release"
    assert json.loads((out / "release" / "metadata.json").read_text())["sharded_backend"] == "torch_dist"
    with torch.serialization.safe_globals([argparse.Namespace]):
        common = torch.load(out / "release" / "common.pt", weights_only=True)  # noqa: TID251
    assert (common["checkpoint_version"], common["iteration"]) == (3.0, 0)
    args = common["args"]
    assert (args.num_layers, args.num_experts, args.moe_ffn_hidden_size, args.kv_channels) == (2, 4, 12, 8)
    assert (args.tensor_model_parallel_size, args.untie_embeddings_and_output_weights) == (1, True)
    entries = FileSystemReader(out / "release").read_metadata().state_dict_metadata
    sizes = {
        tuple(chunk.sizes[:2])
        for chunk in entries["decoder.layers.mlp.experts.experts.linear_fc1.weight"].chunks  # type: ignore[union-attr]
    }
    assert sizes == {(1, 1)}


@pytest.mark.parametrize("case", ROUND_TRIPS)
def test_a_family_comes_back_from_megatron_bit_by_bit(tmp_path: Path, case: str) -> None:
    model, out, back = _model(tmp_path, case), tmp_path / "out", tmp_path / "back"
    done = run("convert", model, out, "--to", "megatron", "--role", "actor")
    assert done.code == 0, done.err
    assert run("gather", out, back).code == 0
    assert differences(written(back), load_file(model / "model.safetensors")) == []


def test_a_critic_has_its_head_in_place_of_the_output_layer(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run("convert", CRITIC, out, "--to", "megatron", "--role", "critic")
    assert done.code == 0, done.err
    have, wanted = _read_by_torch(out / "release"), oracle(CRITIC)
    assert torch.equal(have["output_layer.weight"], wanted["score.weight"])
    assert run("gather", out, tmp_path / "back").code == 0
    assert differences(written(tmp_path / "back"), wanted) == []


def test_tensors_that_no_row_takes_are_refused_by_name(tmp_path: Path) -> None:
    model, out = _model(tmp_path, "qwen2"), tmp_path / "out"
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_type": "llama", "attention_bias": True}))
    config["architectures"] = ["LlamaForCausalLM"]
    done = run("convert", model, out, "--to", "megatron", "--role", "actor", "--allow", "tensors-unexpected")
    assert done.code == 3, done.out
    assert not out.exists()


def test_a_family_without_a_table_is_refused(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "olmo2", hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=32,
        num_key_value_heads=1,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "hf")
    done = run("convert", tmp_path / "hf", tmp_path / "out", "--to", "megatron", "--role", "actor")
    assert done.code == 3
    assert "megatron-family" in done.err
    assert not (tmp_path / "out").exists()


def test_embeddings_that_are_tied_by_config_and_stored_with_other_values_are_both_written(tmp_path: Path) -> None:
    model = _model(tmp_path, "qwen2-tied")
    held = load_file(model / "model.safetensors")
    held["lm_head.weight"] = held["model.embed_tokens.weight"] + 1
    save_file(held, model / "model.safetensors", {"format": "pt"})
    done = run("convert", model, tmp_path / "out", "--to", "megatron", "--role", "actor")
    assert done.code == 0, done.err
    have = _read_by_torch(tmp_path / "out" / "release")
    assert torch.equal(have["output_layer.weight"][:99], held["lm_head.weight"])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


def test_ranks_of_other_trainers_are_no_business_of_a_folder(tmp_path: Path) -> None:
    done = run("convert", _model(tmp_path, "qwen2"), tmp_path / "out", "--to", "trl", "--role", "actor", "--tp", "2")
    assert done.code == 2
    assert "--tp goes with --to megatron" in done.text
