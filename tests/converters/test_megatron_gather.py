"""`rlhf-convert gather` on checkpoints that megatron-core wrote, with TP and PP ranks: bit-equal to the live model.

The oracle is the model of transformers whose weights were put into GPTModel (tests/runs/mcore/save.py).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from mcore.compare import RUNS, facts, oracle, run_names, shards, written
from oracle.command import run
from zero.compare import differences

QWEN2, LLAMA, CRITIC = RUNS / "qwen2-tied-tp2-pp2", RUNS / "llama-layers-pp2", RUNS / "qwen3-critic-tp2"


def _refused(code: str, *arguments: str) -> dict[str, Any]:
    """The error of a command that wrote nothing."""
    done = run("gather", *arguments, "--json")
    assert done.code == 3, done.out + done.err
    error: dict[str, Any] = json.loads(done.out)
    found = error.get("error", error)
    assert found["code"] == code, found
    assert not Path(arguments[1]).exists()
    return found  # type: ignore[no-any-return]


def _base(tmp_path: Path, run_folder: Path, **changes: Any) -> str:
    """The run's own config, changed, as a base model's folder with the weights that it had."""
    folder = tmp_path / "base"
    shutil.copytree(run_folder / "hf", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return str(folder)


def _without_hf(tmp_path: Path, run_folder: Path) -> Path:
    """A run of which nothing but the checkpoint is left."""
    copied = tmp_path / run_folder.name
    shutil.copytree(shards(run_folder), copied / "iter_0000010")
    return copied


@pytest.mark.parametrize("name", run_names())
def test_every_tensor_is_that_of_the_live_model(tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    done = run("gather", str(RUNS / name), str(out))
    assert done.code == 0, done.err
    assert differences(written(out), oracle(RUNS / name)) == []


def test_a_gathered_model_is_loaded_by_transformers_without_a_word(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    out = tmp_path / "out"
    assert run("gather", str(shards(QWEN2)), str(out)).code == 0
    model, told = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(told.values()), told
    assert model.config.vocab_size == model.model.embed_tokens.weight.shape[0] == 99


def test_sizes_of_the_run_are_said_and_what_is_no_weight_is_counted(tmp_path: Path) -> None:
    done = run("gather", str(shards(QWEN2)), str(tmp_path / "out"))
    assert "the run had TP 2, PP 2, EP 1" in done.out
    assert "1 dropped: *._extra_state" in done.out


def test_rows_that_no_token_has_are_cut_and_it_is_said(tmp_path: Path) -> None:
    done = run("gather", str(shards(LLAMA)), str(tmp_path / "out"))
    assert "13 of 112 rows of the vocabulary are padding that no token has; they are cut" in done.out


def test_a_critic_becomes_a_classifier_with_one_label(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    out = tmp_path / "out"
    done = run("gather", str(shards(CRITIC)), str(out))
    assert done.code == 0, done.err
    model, told = AutoModelForSequenceClassification.from_pretrained(out, output_loading_info=True)
    assert not any(told.values()), told
    assert model.config.num_labels == 1
    wanted = oracle(CRITIC)["score.weight"]
    assert torch.equal(model.score.weight, wanted)
    assert facts(CRITIC)["args"] is False


def test_a_critic_goes_to_another_trainer_in_one_pass(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run("convert", str(CRITIC), str(out), "--to", "verl", "--role", "critic")
    assert done.code == 0, done.err
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForTokenClassification"]
    wanted = oracle(CRITIC) | {"score.bias": torch.zeros(1, dtype=torch.bfloat16)}
    assert differences(written(out), wanted) == []


def test_without_a_config_the_base_is_asked_for(tmp_path: Path) -> None:
    folder = _without_hf(tmp_path, LLAMA)
    found = _refused("config-missing", str(folder), str(tmp_path / "out"))
    assert "--base" in str(found["next"])
    base = _base(tmp_path, LLAMA)
    out = tmp_path / "out"
    done = run("gather", str(folder), str(out), "--base", base)
    assert done.code == 0, done.err
    assert differences(written(out), oracle(LLAMA)) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_hidden_layers": 3}, "the checkpoint's layers are 2, and config.json 3"),
        ({"num_key_value_heads": 4}, "num_query_groups is 2, and config.json 4"),
        ({"num_attention_heads": 2}, "num_attention_heads is 4, and config.json 2"),
        ({"intermediate_size": 32}, "ffn_hidden_size is 24, and config.json 32"),
        ({"vocab_size": 113}, "it has 112 rows, and config.json a vocabulary of 113"),
        ({"vocab_size": 80}, "32 rows of padding, and Megatron pads to multiples of 16"),
    ],
)
def test_another_models_config_is_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    folder = _without_hf(tmp_path, LLAMA)
    base = _base(tmp_path, LLAMA, **changes)
    found = _refused("megatron-config", str(folder), str(tmp_path / "out"), "--base", base)
    assert words in found["what"]


def test_heads_are_told_by_shapes_where_the_training_script_is_not_recorded(tmp_path: Path) -> None:
    folder = _without_hf(tmp_path, CRITIC)
    base = _base(tmp_path, CRITIC, num_key_value_heads=4)
    found = _refused("megatron-config", str(folder), str(tmp_path / "out"), "--base", base)
    assert "has 64 rows, and config.json's 4 heads in 4 groups of 8 make 96" in found["what"]


def test_keys_that_no_row_of_the_family_takes_are_named(tmp_path: Path) -> None:
    folder = _without_hf(tmp_path, QWEN2)
    base = _base(tmp_path, QWEN2, model_type="llama", architectures=["LlamaForCausalLM"])
    found = _refused("megatron-keys", str(folder), str(tmp_path / "out"), "--base", base)
    assert "decoder.layers.{0..1}.self_attention.linear_qkv.bias" in found["what"]


def test_what_the_family_has_and_the_checkpoint_lacks_is_missing(tmp_path: Path) -> None:
    folder = _without_hf(tmp_path, LLAMA)
    base = _base(tmp_path, LLAMA, model_type="qwen2", architectures=["Qwen2ForCausalLM"])
    found = _refused("tensors-missing", str(folder), str(tmp_path / "out"), "--base", base)
    assert "model.layers.{0..1}.self_attn.k_proj.bias" in found["what"]


def test_a_family_that_the_table_lacks_is_refused(tmp_path: Path) -> None:
    folder = _without_hf(tmp_path, LLAMA)
    base = _base(tmp_path, LLAMA, model_type="olmo2", architectures=["Olmo2ForCausalLM"])
    found = _refused("megatron-family", str(folder), str(tmp_path / "out"), "--base", base)
    assert "llama" in found["expected"]


def test_the_receipt_names_no_file_of_megatrons_arguments(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("gather", str(shards(LLAMA)), str(out)).code == 0
    assert sorted(p.name for p in out.iterdir()) == ["config.json", "model.safetensors", "rlhf-convert.json"]
