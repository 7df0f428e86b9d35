"""Diagnoses of configs and ties: each breakage of a sound model is named, and sound models are left alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from converter.cli import main
from converter.examine.doctor import DoctorRequest, examine

SIZES = {
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 16,
}


def codes(folder: Path, **asked: Any) -> dict[str, str]:
    return {f.code: f.severity for f in examine(DoctorRequest(str(folder), **asked)).findings}


@pytest.fixture
def causal(tmp_path: Path) -> Path:
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(tmp_path / "lm")
    return tmp_path / "lm"


@pytest.fixture
def reward(tmp_path: Path) -> Path:
    LlamaForSequenceClassification(LlamaConfig(**SIZES, num_labels=1, pad_token_id=0)).save_pretrained(tmp_path / "rm")
    return tmp_path / "rm"


def edit(folder: Path, drop: tuple[str, ...] = (), name: str = "config.json", **changes: Any) -> None:
    value = json.loads((folder / name).read_text())
    value.update(changes)
    (folder / name).write_text(json.dumps({k: v for k, v in value.items() if k not in drop}))


def store(folder: Path, **changes: torch.Tensor | None) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors.update({k.replace("__", "."): v for k, v in changes.items() if v is not None})
    for name in [k.replace("__", ".") for k, v in changes.items() if v is None]:
        del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_sound_models_have_no_finding(causal: Path, reward: Path) -> None:
    assert codes(causal) == {}
    assert codes(reward) == {}
    assert codes(causal, deep=True) == {}


@pytest.mark.parametrize(
    ("model_type", "more"),
    [
        ("gpt2", {"n_embd": 8, "n_head": 2, "n_layer": 1, "vocab_size": 16}),
        ("gpt_neox", SIZES),
        ("qwen2", SIZES),
        ("qwen3", {**SIZES, "head_dim": 4}),
        ("mistral", SIZES),
        ("gemma", {**SIZES, "head_dim": 4}),
        ("gemma2", {**SIZES, "head_dim": 4}),
        ("phi3", {**SIZES, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}),
        ("opt", {"hidden_size": 8, "ffn_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 16,
                 "word_embed_proj_dim": 8, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 2}),
        ("bloom", {"hidden_size": 8, "n_head": 2, "n_layer": 1, "vocab_size": 16, "bos_token_id": 1,
                   "eos_token_id": 2}),
        ("falcon", {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 16,
                    "bos_token_id": 1, "eos_token_id": 2}),
        ("stablelm", SIZES),
        ("olmo2", {**SIZES, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}),
        ("granite", SIZES),
        ("phi", SIZES),
        ("cohere", {**SIZES, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}),
        ("smollm3", {**SIZES, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}),
        ("gptj", {"n_embd": 8, "n_head": 2, "n_layer": 1, "vocab_size": 16, "rotary_dim": 4}),
        ("mpt", {"d_model": 8, "n_heads": 2, "n_layers": 1, "vocab_size": 16}),
        ("mixtral", {**SIZES, "num_local_experts": 2}),
        ("qwen3_moe", {**SIZES, "head_dim": 4, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8}),
        ("starcoder2", {**SIZES, "bos_token_id": 1, "eos_token_id": 2}),
    ],
)  # fmt: skip
def test_what_transformers_writes_has_no_finding(tmp_path: Path, model_type: str, more: dict[str, Any]) -> None:
    config = AutoConfig.for_model(model_type, **more)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "lm")
    assert {c for c, s in codes(tmp_path / "lm", deep=True).items() if s != "cosmetic"} == set()


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "mistral", "gpt2"])
def test_reward_models_that_transformers_writes_have_no_finding(tmp_path: Path, model_type: str) -> None:
    sizes = {"n_embd": 8, "n_head": 2, "n_layer": 1, "vocab_size": 16} if model_type == "gpt2" else SIZES
    config = AutoConfig.for_model(model_type, **sizes, num_labels=1, pad_token_id=0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "rm")
    assert {c for c, s in codes(tmp_path / "rm", deep=True).items() if s != "cosmetic"} == set()


def test_a_head_with_other_rows_than_labels_is_an_error(reward: Path) -> None:
    edit(reward, drop=("id2label", "label2id", "num_labels"))
    assert codes(reward) == {"labels-mismatch": "error"}
    with pytest.raises(RuntimeError, match=r"mismatch|ignore_mismatched_sizes"):
        AutoModelForSequenceClassification.from_pretrained(reward)


def test_a_reward_model_without_a_pad_token_changes_numbers(reward: Path) -> None:
    edit(reward, pad_token_id=None)
    assert codes(reward) == {"pad-token-missing": "changes-numbers"}


def test_a_pad_token_that_ends_texts_is_mentioned_and_no_fault(reward: Path) -> None:
    edit(reward, pad_token_id=2, eos_token_id=[2, 3])
    assert codes(reward) == {"pad-is-eos": "cosmetic"}


def test_an_architecture_that_is_missing_or_a_wrapper_s_or_openrlhf_s_is_named(causal: Path, reward: Path) -> None:
    edit(causal, drop=("architectures",))
    assert codes(causal) == {"architecture-missing": "cosmetic"}
    edit(causal, architectures=["FSDPLlamaForCausalLM"])
    assert codes(causal) == {"architecture-wrapper": "error"}
    edit(reward, architectures=["RewardModel"])
    assert codes(reward) == {"architecture-openrlhf": "cosmetic"}
    assert codes(reward, target="openrlhf") == {"loader-accepts": "cosmetic"}


def test_rows_that_are_not_the_vocabulary_are_an_error(causal: Path) -> None:
    edit(causal, vocab_size=15)
    assert codes(causal) == {"vocabulary-rows": "error"}
    with pytest.raises(RuntimeError):
        AutoModelForCausalLM.from_pretrained(causal)


def test_a_lost_output_embedding_is_an_error_where_it_is_not_tied(causal: Path) -> None:
    store(causal, lm_head__weight=None)
    assert codes(causal) == {"output-embedding-missing": "error"}
    edit(causal, tie_word_embeddings=True)
    assert codes(causal) == {}


def test_tied_copies_are_cosmetic_where_equal_and_change_numbers_where_not(causal: Path) -> None:
    edit(causal, tie_word_embeddings=True)
    found = codes(causal)
    assert found == {"tied-copies": "cosmetic"}
    assert codes(causal, deep=True) == {"tied-copies": "changes-numbers"}
    embedding = load_file(causal / "model.safetensors")["model.embed_tokens.weight"]
    store(causal, lm_head__weight=embedding.clone())
    assert codes(causal, deep=True) == {"tied-copies": "cosmetic"}


def test_an_output_embedding_in_a_reward_model_is_cosmetic(reward: Path) -> None:
    store(reward, lm_head__weight=torch.zeros(16, 8))
    assert codes(reward) == {"output-embedding-in-classifier": "cosmetic"}


def test_code_that_auto_map_names_and_nobody_copied_is_an_error(causal: Path) -> None:
    edit(causal, auto_map={"AutoModelForCausalLM": "modeling_x.XForCausalLM", "AutoConfig": "other/repo--conf.XConfig"})
    assert codes(causal) == {"remote-code-missing": "error"}
    (causal / "modeling_x.py").write_text("")
    assert codes(causal) == {}


def test_a_quantisation_that_no_tensor_shows_is_an_error(causal: Path) -> None:
    edit(causal, quantization_config={"quant_method": "fp8"})
    assert codes(causal) == {"quantisation-left": "error"}


def test_weights_of_another_dtype_than_the_config_says_are_cosmetic(causal: Path) -> None:
    edit(causal, dtype="bfloat16")
    assert codes(causal) == {"dtype-differs": "cosmetic"}


def test_rope_parameters_alone_change_numbers_for_transformers_4(causal: Path) -> None:
    edit(causal, rope_parameters={"rope_type": "default", "rope_theta": 500000.0}, drop=("rope_theta",))
    assert codes(causal) == {"rope-of-transformers-5": "cosmetic"}
    assert codes(causal, target="transformers@4") == {"rope-of-transformers-5": "changes-numbers"}


def test_a_tokenizer_of_transformers_5_is_an_error_for_transformers_4(causal: Path) -> None:
    value = {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<a>"]}
    (causal / "tokenizer_config.json").write_text(json.dumps(value))
    (causal / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
    assert codes(causal) == {}
    assert codes(causal, target="transformers@4") == {"tokenizer-of-transformers-5": "error"}


def test_end_tokens_that_the_base_has_and_the_model_lost_change_numbers(causal: Path, tmp_path: Path) -> None:
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(tmp_path / "base")
    edit(tmp_path / "base", name="generation_config.json", eos_token_id=[5, 7])
    edit(causal, name="generation_config.json", eos_token_id=7)
    assert codes(causal) == {}
    assert codes(causal, base=str(tmp_path / "base")) == {"end-tokens-lost": "changes-numbers"}


def test_a_config_that_is_cut_is_an_error_and_no_traceback(causal: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (causal / "config.json").write_text('{"model_type": "lla')
    assert "config-unreadable" in codes(causal)
    assert main(["doctor", str(causal)]) == 1
    assert "config-unreadable" in capsys.readouterr().out
