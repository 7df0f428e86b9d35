"""A base of which only the config is wanted may come without weights; where weights are wanted they are asked for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from converter.converters.fill.fill import Fill
from converter.recipe.fields import config_will_do
from converter.recipe.options import WriteOptions
from converter.recipe.recipe import Recipe, Step
from converter.recipe.verbs.pieces import output
from converter.sources.opening import InputSpec
from mcore.compare import RUNS, oracle, shards, written
from oracle.command import run
from zero.compare import differences

LLAMA, CRITIC = RUNS / "llama-layers-pp2", RUNS / "qwen3-critic-tp2"
INDEX = {"metadata": {}, "weight_map": {"model.embed_tokens.weight": "model-00001-of-00002.safetensors"}}


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """Llama's config and a tokenizer, without a weight."""
    folder = tmp_path / "bare"
    folder.mkdir()
    shutil.copy(LLAMA / "hf" / "config.json", folder)
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 64}')
    (folder / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
    return folder


@pytest.fixture
def alone(tmp_path: Path) -> Path:
    """A run of which nothing but the shards is left."""
    shutil.copytree(shards(LLAMA), tmp_path / "run" / "iter_0000010")
    return tmp_path / "run"


@pytest.mark.parametrize("has_index", [False, True], ids=["no-weights", "index-without-its-files"])
def test_a_run_with_weights_takes_a_bases_config_and_tokenizer(
    tmp_path: Path, bare: Path, alone: Path, has_index: bool
) -> None:
    if has_index:
        (bare / "model.safetensors.index.json").write_text(json.dumps(INDEX))
    out = tmp_path / "out"
    done = run("gather", alone, out, "--base", bare)
    assert done.code == 0, done.err
    assert "config alone" in done.text
    assert differences(written(out), oracle(LLAMA)) == []
    assert (out / "tokenizer_config.json").read_text() == '{"model_max_length": 64}'


def test_verify_compares_with_the_run_over_the_same_base(tmp_path: Path, bare: Path, alone: Path) -> None:
    out = tmp_path / "out"
    assert run("gather", alone, out, "--base", bare).code == 0
    done = run("verify", out, "--against", alone, "--base", bare)
    assert done.code == 0, done.text


def test_one_pass_to_a_trainer_takes_it_too(tmp_path: Path) -> None:
    run_folder, base, out = tmp_path / "run", tmp_path / "base", tmp_path / "out"
    shutil.copytree(shards(CRITIC), run_folder / "iter_0000010")
    base.mkdir()
    shutil.copy(CRITIC / "hf" / "config.json", base)
    done = run("convert", run_folder, out, "--to", "trl", "--role", "reward", "--base", base)
    assert done.code == 0, done.err
    assert differences(written(out), oracle(CRITIC)) == []


def test_another_models_config_is_refused_as_with_weights(tmp_path: Path, bare: Path, alone: Path) -> None:
    config = json.loads((bare / "config.json").read_text())
    (bare / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    done = run("gather", alone, tmp_path / "out", "--base", bare)
    assert done.code == 3
    assert "megatron-config" in done.err
    assert not (tmp_path / "out").exists()


def test_a_merge_asks_for_the_weights(tmp_path: Path, bare: Path) -> None:
    import torch
    from safetensors.torch import save_file

    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 4}')
    save_file({"base_model.model.x.lora_A.weight": torch.ones(2, 2)}, adapter / "adapter_model.safetensors")
    done = run("merge-lora", adapter, tmp_path / "out", "--base", bare)
    assert done.code == 3
    assert "weights-missing" in done.err


def test_a_step_that_needs_weights_of_the_same_input_keeps_them_needed() -> None:
    inputs = {n: InputSpec(n) for n in ("source", "base")}
    gather, fill = Step("gather", {"base": "base"}), Step("fill", {"base": "base"})
    assert Fill.name == "fill"
    for steps, enough in (((gather,), {"base"}), ((fill,), set()), ((gather, fill), set())):
        recipe = Recipe(inputs, steps, output(WriteOptions()), file="test")
        assert config_will_do(recipe) == enough


def test_a_base_that_is_named_takes_the_place_of_another_models_config_beside_the_shards(
    tmp_path: Path, bare: Path
) -> None:
    folder = Path(shutil.copytree(LLAMA, tmp_path / "run"))
    config = json.loads((folder / "hf" / "config.json").read_text())
    (folder / "hf" / "config.json").write_text(json.dumps(config | {"num_attention_heads": 2}))
    (folder / "hf" / "model.safetensors").unlink()
    out = tmp_path / "out"
    assert run("gather", folder, out).code == 3
    done = run("gather", folder, out, "--base", bare)
    assert done.code == 0, done.err
    assert "num_attention_heads is 4, and config.json 2" in done.text
    assert differences(written(out), oracle(LLAMA)) == []
