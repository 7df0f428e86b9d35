"""`repair --vocab`: rows that no token has are cut or added on request; a token's row never goes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from converter.cli import main
from converter.shipped import shipped
from hub_here import run

WORDS = 20
SIZES = {"hidden_size": 8, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT = {**SIZES, "vocab_size": WORDS, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}


def gemma3() -> PreTrainedModel:
    text = {**TEXT, "head_dim": 4, "num_key_value_heads": 1, "sliding_window": 4}
    vision = {**SIZES, "image_size": 28, "patch_size": 14}
    tokens = {"boi_token_index": 2, "eoi_token_index": 3, "image_token_index": 4}
    return Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision, **tokens))


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**TEXT)),
    "llama, tied": lambda: LlamaForCausalLM(LlamaConfig(**TEXT, tie_word_embeddings=True)),
    "reward": lambda: LlamaForSequenceClassification(LlamaConfig(**TEXT, num_labels=1)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=WORDS, n_embd=8, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=1)
    ),
    "phi, output bias": lambda: PhiForCausalLM(PhiConfig(**TEXT)),
    "bert": lambda: BertForMaskedLM(BertConfig(**SIZES, vocab_size=WORDS, pad_token_id=0)),
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(vocab_size=WORDS, d_model=8, d_kv=4, d_ff=24, num_layers=1, num_heads=2)
    ),
    "gemma3, images": gemma3,
}


def tokenizer(folder: Path, words: int = WORDS) -> None:
    made = Tokenizer(WordLevel({f"w{i}": i for i in range(words)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=made, pad_token="w0", unk_token="w0").save_pretrained(folder)


def saved(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    tokenizer(folder)
    return folder


def values(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_file(folder / "model.safetensors"))


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    return saved(MODELS["llama"](), tmp_path / "model")


@pytest.mark.parametrize("family", MODELS)
def test_what_transformers_padded_is_cut_to_what_it_was(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MODELS[family]()
    before = saved(model, tmp_path / "before")
    model.resize_token_embeddings(WORDS, pad_to_multiple_of=32, mean_resizing=False)
    padded, out = saved(model, tmp_path / "padded"), tmp_path / "out"
    assert not same(values(padded), values(before))
    assert main(["repair", str(padded), str(out), "--vocab", "tokenizer", "--allow", "vocabulary-trim", "-q"]) == 0
    assert same(values(out), values(before))
    config, expected = AutoConfig.from_pretrained(out), AutoConfig.from_pretrained(before)
    assert config.get_text_config().vocab_size == expected.get_text_config().vocab_size == WORDS


@pytest.mark.parametrize("family", MODELS)
def test_added_rows_are_zero_and_the_others_what_they_were(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MODELS[family]()
    before, out = saved(model, tmp_path / "before"), tmp_path / "out"
    command = ["repair", str(before), str(out), "--vocab", "24", "--allow", "vocabulary-padding", "-q"]
    assert main(command) == 0
    model.resize_token_embeddings(24, mean_resizing=False)
    grown = saved(model, tmp_path / "grown")
    old, new, shapes = values(before), values(out), {n: t.shape for n, t in values(grown).items()}
    assert {n: t.shape for n, t in new.items()} == shapes
    for name, tensor in new.items():
        assert torch.equal(tensor[: len(old[name])], old[name])
        assert not tensor[len(old[name]) :].any()


def test_a_trimmed_model_says_what_the_padded_one_says(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**TEXT, "vocab_size": 32})).eval()
    saved(model, tmp_path / "model")
    command = ["repair", str(tmp_path / "model"), str(tmp_path / "out"), "--vocab", "20", "-q"]
    assert main([*command, "--allow", "vocabulary-trim"]) == 0
    tokens = torch.arange(WORDS)[None]
    with torch.no_grad():
        expected = model(tokens).logits[..., :WORDS]
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()(tokens).logits
    assert torch.equal(found, expected)


@pytest.mark.parametrize("rows", ["8", "19"])
def test_a_row_that_a_token_has_is_never_cut(rows: str, llama: Path, tmp_path: Path) -> None:
    refused = run("repair", llama, tmp_path / "out", "--vocab", rows, "--allow", "vocabulary-trim")
    assert (refused.returncode, "vocabulary-in-use" in refused.stderr) == (3, True)
    assert not (tmp_path / "out").exists()


def test_a_special_token_that_only_the_config_knows_keeps_its_row(llama: Path, tmp_path: Path) -> None:
    tokenizer(llama, words=10)
    config = json.loads((llama / "config.json").read_text()) | {"eos_token_id": [1, 15]}
    (llama / "config.json").write_text(json.dumps(config))
    refused = run("repair", llama, tmp_path / "out", "--vocab", "tokenizer", "--allow", "vocabulary-trim")
    assert (refused.returncode, "eos_token_id 15" in refused.stderr) == (3, True)


@pytest.mark.parametrize(("rows", "code"), [("24", "vocabulary-padding"), ("20", "vocabulary-trim")])
def test_rows_come_and_go_only_with_consent(rows: str, code: str, tmp_path: Path) -> None:
    size = {"vocab_size": 20 if rows == "24" else 32}
    model = saved(LlamaForCausalLM(LlamaConfig(**{**TEXT, **size})), tmp_path / "model")
    refused = run("repair", model, tmp_path / "out", "--vocab", rows)
    assert (refused.returncode, f"--allow {code}" in refused.stderr) == (3, True)
    assert not (tmp_path / "out").exists()


def test_without_a_tokenizer_nothing_is_cut(llama: Path, tmp_path: Path) -> None:
    for file in llama.glob("tokenizer*"):
        file.unlink()
    for rows in ("tokenizer", "18"):
        refused = run("repair", llama, tmp_path / "out", "--vocab", rows, "--allow", "vocabulary-trim")
        assert (refused.returncode, "tokenizer-unknown" in refused.stderr) == (3, True)


def test_the_config_follows_the_rows(llama: Path, tmp_path: Path) -> None:
    config = json.loads((llama / "config.json").read_text()) | {"vocab_size": 999}
    (llama / "config.json").write_text(json.dumps(config))
    assert main(["repair", str(llama), str(tmp_path / "out"), "--vocab", "rows", "-q"]) == 0
    assert same(values(tmp_path / "out"), values(llama))
    AutoModel.from_pretrained(tmp_path / "out")


def test_embeddings_of_two_heights_are_brought_to_one(llama: Path, tmp_path: Path) -> None:
    tensors = values(llama)
    short = tensors["lm_head.weight"]
    tensors["lm_head.weight"] = torch.cat([short, torch.ones(4, 8)])
    save_file(tensors, llama / "model.safetensors", metadata={"format": "pt"})
    refused = run("repair", llama, tmp_path / "out", "--vocab", "rows")
    assert (refused.returncode, "vocab-mismatch" in refused.stderr) == (3, True)
    assert main(["repair", str(llama), str(tmp_path / "out"), "--vocab", "20", "--allow", "vocabulary-trim", "-q"]) == 0
    assert torch.equal(values(tmp_path / "out")["lm_head.weight"], short)


def test_a_tensor_of_an_unknown_name_that_is_as_high_stops_the_cut(llama: Path, tmp_path: Path) -> None:
    tensors = values(llama) | {"model.token_scores.weight": torch.ones(WORDS, 3)}
    save_file(tensors, llama / "model.safetensors", metadata={"format": "pt"})
    refused = run("repair", llama, tmp_path / "out", "--vocab", "24", "--allow", "vocabulary-padding")
    assert (refused.returncode, "model.token_scores.weight" in refused.stderr) == (3, True)


def test_names_of_other_families_are_known_by_their_height(tmp_path: Path) -> None:
    """InternLM2's, whose code is not transformers' own."""
    names = {"model.tok_embeddings.weight": (32, 8), "output.weight": (32, 8), "model.norm.weight": (8,)}
    (tmp_path / "model").mkdir()
    save_file(
        {n: torch.ones(s) for n, s in names.items()}, tmp_path / "model/model.safetensors", metadata={"format": "pt"}
    )
    (tmp_path / "model/config.json").write_text(
        '{"model_type": "internlm2", "vocab_size": 999, "architectures": ["A"]}'
    )
    tokenizer(tmp_path / "model")
    command = ["repair", str(tmp_path / "model"), str(tmp_path / "out"), "--vocab", "tokenizer", "-q"]
    assert main([*command, "--allow", "vocabulary-trim"]) == 0
    assert {n: tuple(t.shape) for n, t in values(tmp_path / "out").items()} == {
        "model.tok_embeddings.weight": (20, 8), "output.weight": (20, 8), "model.norm.weight": (8,)
    }  # fmt: skip


@pytest.mark.parametrize("to", ["many", "-1", "0", "1.5", "", "١٢"])
def test_what_is_no_vocabulary_is_a_usage_error(to: str, llama: Path, tmp_path: Path) -> None:
    assert run("repair", llama, tmp_path / "out", f"--vocab={to}").returncode == 2


def test_the_receipt_counts_the_rows(tmp_path: Path) -> None:
    model = saved(LlamaForCausalLM(LlamaConfig(**{**TEXT, "vocab_size": 32})), tmp_path / "model")
    main(["repair", str(model), str(tmp_path / "out"), "--vocab", "20", "--allow", "vocabulary-trim", "-q"])
    receipt: dict[str, Any] = json.loads((tmp_path / "out" / "rlhf-convert.json").read_text())
    assert "cuts 12 rows of" in receipt["consents"]["vocabulary-trim"]


def test_an_adapter_has_no_vocabulary_of_its_own(tmp_path: Path) -> None:

    fixture = shipped("fixtures") / "tiny-reward-adapter"
    shutil.copytree(fixture, tmp_path / "adapter")
    refused = run("repair", tmp_path / "adapter", tmp_path / "out", "--vocab", "8")
    assert refused.returncode == 2, refused.stderr
