"""What PEFT trains beside plain LoRA, gathered from a trainer's state: exactly what PEFT itself saves, or refused.

The state is what DeepSpeed writes at stage 1 (the module whole, `param_shapes` naming what was trained), made of a real
PEFT model's own `state_dict`; the oracle is PEFT: its `save_pretrained`, its loader and its `merge_and_unload`.
"""

from __future__ import annotations

import json
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from oracle.command import run

PREFIX = "base_model.model."
LAYERS = ["q_proj", "down_proj"]
pytestmark = pytest.mark.filterwarnings("ignore:.*(gradient_checkpointing|tie_word_embeddings|tied|embedding).*")

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "lora-bias": {"lora_bias": True, "target_modules": ["q_proj", "v_proj"]},
    "two-whole-modules": {"modules_to_save": ["score", "v_proj"]},
    "whole-embedding": {"modules_to_save": ["score", "embed_tokens"]},
    "tokens": {"trainable_token_indices": {"embed_tokens": [1, 5, 7]}},
    "patterns": {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"down_proj": 5}},
    "bias": {"bias": "lora_only"},
    "all-biases": {"bias": "all"},
}


def _trained(tmp_path: Path, name: str, **more: Any) -> Any:
    """A PEFT model whose trained values are random, and `run/`, `saved/` and `base/` as it would leave them."""
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen2Config, Qwen2ForSequenceClassification

    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Qwen2Config(**shape, num_key_value_heads=1, vocab_size=20, num_labels=1, pad_token_id=0)
    base = Qwen2ForSequenceClassification(config)
    base.save_pretrained(tmp_path / "base")
    options = {"r": 2, "lora_alpha": 6, "target_modules": LAYERS, "task_type": "SEQ_CLS"}
    model = get_peft_model(base, LoraConfig(**(options | VARIANTS[name] | more)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path / "saved")
    _save_state(model, tmp_path / "run")
    config.save_pretrained(tmp_path / "run")
    config_text = (tmp_path / "saved" / "adapter_config.json").read_text()
    (tmp_path / "run" / "adapter_config.json").write_text(config_text)
    return model


def _save_state(model: Any, folder: Path) -> None:
    tag = folder / "global_step3"
    tag.mkdir(parents=True)
    (folder / "latest").write_text("global_step3")
    trained = OrderedDict((n, p.shape) for n, p in model.named_parameters() if p.requires_grad)
    state = {
        "module": OrderedDict((n, t.clone()) for n, t in model.state_dict().items()), "param_shapes": [trained],
        "buffer_names": [], "shared_params": {}, "dp_world_size": 1, "global_steps": 3, "ds_version": "0.19.8",
        "frozen_param_shapes": None, "frozen_param_fragments": None, "ds_config": {},
    }  # fmt: skip
    torch.save(state, tag / "mp_rank_00_model_states.pt")


def _loaded(tmp_path: Path, adapter: str) -> Any:
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
        return PeftModel.from_pretrained(base, tmp_path / adapter).eval()


def _scores(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([[1, 5, 9, 7, 3], [2, 4, 6, 8, 19]])).logits


@pytest.mark.parametrize("name", VARIANTS)
def test_the_adapter_is_what_peft_would_have_saved(tmp_path: Path, name: str) -> None:
    model = _trained(tmp_path, name)
    done = run("gather", tmp_path / "run", tmp_path / "out", "--emit", "adapter")
    assert done.code == 0, done.err
    saved = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    # PEFT adds the frozen embedding where LoRA changes it; a base model has that.
    frozen = {n for n in saved if n.endswith("embed_tokens.base_layer.weight")}
    assert found.keys() == saved.keys() - frozen
    assert all(torch.equal(found[n], saved[n]) for n in found)
    assert torch.equal(_scores(_loaded(tmp_path, "out")), _scores(model.eval()))


@pytest.mark.parametrize("name", VARIANTS)
def test_the_merged_model_scores_like_the_trained_one(tmp_path: Path, name: str) -> None:
    from transformers import AutoModelForSequenceClassification

    model = _trained(tmp_path, name).eval()
    done = run("gather", tmp_path / "run", tmp_path / "out", "--emit", "merged")
    assert done.code == 0, done.err
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(_scores(merged), _scores(model), rtol=1e-5, atol=1e-6)


def test_merging_over_a_base_puts_trained_biases_in_their_place(tmp_path: Path) -> None:
    """Where the run has no frozen weights, the adapter alone has to carry them."""
    from transformers import AutoModelForSequenceClassification

    model = _trained(tmp_path, "all-biases").eval()
    path = tmp_path / "run" / "global_step3" / "mp_rank_00_model_states.pt"
    state = torch.load(path, weights_only=True)  # noqa: TID251
    trained = state["param_shapes"][0]
    state["module"] = {n: t for n, t in state["module"].items() if n in trained}
    torch.save(state, path)
    done = run("gather", tmp_path / "run", tmp_path / "out", "--emit", "merged", "--base", tmp_path / "base")
    assert done.code == 0, done.err
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(_scores(merged), _scores(model), rtol=1e-5, atol=1e-6)


def test_two_adapters_are_refused_by_name(tmp_path: Path) -> None:
    from peft import LoraConfig

    model = _trained(tmp_path, "plain")
    model.add_adapter("second", LoraConfig(r=2, target_modules=LAYERS, task_type="SEQ_CLS"))
    _save_state(model, tmp_path / "two")
    done = run("gather", tmp_path / "two", tmp_path / "out", "--lora-alpha", "6")
    assert (done.code, "several-adapters" in done.err, "default, second" in done.err) == (3, True, True), done.err


@pytest.mark.parametrize("name", [n for n in VARIANTS if n != "patterns"])
def test_a_lost_config_is_rebuilt_or_refused_never_guessed(tmp_path: Path, name: str) -> None:
    model = _trained(tmp_path, name).eval()
    (tmp_path / "run" / "adapter_config.json").unlink()
    more = ["--rslora"] if name == "rslora" else []
    done = run("gather", tmp_path / "run", tmp_path / "out", "--emit", "adapter", "--lora-alpha", "6", *more)
    if name == "tokens":
        # Which tokens were trained is in no tensor.
        assert (done.code, "adapter-config-lost" in done.err, (tmp_path / "out").exists()) == (3, True, False), done.err
        return
    assert done.code == 0, done.err
    assert torch.equal(_scores(_loaded(tmp_path, "out")), _scores(model))


def test_a_rebuilt_config_says_what_it_was_told_and_takes_ranks_from_shapes(tmp_path: Path) -> None:
    _trained(tmp_path, "patterns")
    (tmp_path / "run" / "adapter_config.json").unlink()
    done = run("gather", tmp_path / "run", tmp_path / "out", "--emit", "adapter", "--lora-alpha", "6")
    assert done.code == 0, done.err
    assert "r = 2, 3, lora_alpha = 6 for every layer and rsLoRA off, as given" in done.out
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert sorted(config["rank_pattern"].values()) in ([2, 2], [3, 3])
    loaded = _loaded(tmp_path, "out")
    ranks = {n: t.shape[0] for n, t in loaded.state_dict().items() if "lora_A" in n}
    assert all(r == (3 if "q_proj" in n else 2) for n, r in ranks.items())


def test_asking_for_alpha_also_tells_of_rslora(tmp_path: Path) -> None:
    _trained(tmp_path, "rslora")
    (tmp_path / "run" / "adapter_config.json").unlink()
    done = run("gather", tmp_path / "run", tmp_path / "out")
    assert (done.code, "--rslora if it set use_rslora" in done.err) == (2, True), done.err
