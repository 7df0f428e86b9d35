"""A tokenizer that is cut, empty or larger than the embedding: a load of the model shows nothing of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from oracle.command import run

ROWS = 40
SMALL = {"vocab_size": ROWS, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
WORDS = {"<pad>": 0, "</s>": 1, "<unk>": 2, **{f"w{n}": n for n in range(3, 30)}}
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, intermediate_size=20, eos_token_id=1)),
    "qwen3": lambda: Qwen3ForCausalLM(
        Qwen3Config(**SMALL, intermediate_size=20, num_key_value_heads=2, eos_token_id=1)
    ),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=ROWS, n_embd=16, n_layer=1, n_head=2, eos_token_id=1)),
}
TOKENIZERS: dict[str, Callable[[], Any]] = {
    "llama": lambda: models.Unigram([(w, 0.0) for w in WORDS], unk_id=2),
    "qwen3": lambda: models.BPE(WORDS, []),
    "gpt2": lambda: models.WordLevel(WORDS, unk_token="<unk>"),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sound")
    for family, make in MODELS.items():
        torch.manual_seed(1)
        make().save_pretrained(root / family)
        made = Tokenizer(TOKENIZERS[family]())
        special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
        PreTrainedTokenizerFast(tokenizer_object=made, **special).save_pretrained(root / family)
    return root


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def grow(folder: Path, count: int, **named: str) -> None:
    """Tokens are added, and the embedding is not resized."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([AddedToken(f"<new{n}>", special=True) for n in range(count)])
    for key, text in named.items():
        setattr(tokenizer, key, text)
    tokenizer.save_pretrained(folder)


def cut(folder: Path) -> None:
    file = folder / "tokenizer.json"
    file.write_bytes(file.read_bytes()[:200])


def other_end(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", eos_token="<end>")
    cut_rows(folder)


BROKEN, WITHOUT = "tokenizer-broken", "tokens-without-rows"
HARMS: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut": (cut, BROKEN),
    "no vocabulary": (lambda f: (f / "tokenizer.json").unlink(), BROKEN),
    "an empty vocabulary": (lambda f: (f / "tokenizer.json").write_text('{"model": {"type": "BPE"}}'), BROKEN),
    "settings cut": (lambda f: (f / "tokenizer_config.json").write_text('{"eos_token": '), BROKEN),
    "a pad token more": (lambda f: grow(f, 11, pad_token="<new10>"), WITHOUT),
    "an end token of no vocabulary": (other_end, WITHOUT),
}


def cut_rows(folder: Path) -> None:
    """As many rows as the vocabulary has tokens."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(len(WORDS))
    model.save_pretrained(folder)


def works(folder: Path) -> bool:
    """Whether every token that the tokenizer names has a row."""
    try:
        tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    except Exception:
        return False
    rows = model.get_input_embeddings().num_embeddings
    return len(tokenizer) >= len(WORDS) and max(tokenizer.get_vocab().values()) < rows


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("family", MODELS)
def test_doctor_and_verify_name_it(family: str, harm: str, sound: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(sound / family, tmp_path / "model")
    assert works(folder)
    assert run("doctor", folder).code == 0
    assert run("verify", folder, "--for", "trl", "--role", "actor").code == 0
    do, code = HARMS[harm]
    do(folder)
    assert not works(folder)
    said = run("doctor", folder)
    assert said.code == 1 and code in said.out, said.out
    proved = run("verify", folder, "--for", "trl", "--role", "actor")
    assert proved.code == 4 and "FAIL tokens" in proved.text, proved.text


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("count", [1, 50])
def test_tokens_of_images_and_of_another_size_are_named_and_are_no_fault(
    family: str, count: int, sound: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(sound / family, tmp_path / "model")
    grow(folder, ROWS - len(WORDS) + count)
    said = run("doctor", folder)
    assert said.code == 0 and "tokens-without-rows" in said.out
    assert run("verify", folder, "--for", "trl", "--role", "actor").code == 0


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("family", MODELS)
def test_an_end_number_beyond_is_named(family: str, file: str, sound: Path, tmp_path: Path) -> None:
    """Small models keep the number of the large one whose tokenizer they do not have."""
    folder = shutil.copytree(sound / family, tmp_path / "model")
    edit(folder / file, eos_token_id=[1, ROWS])
    said = run("doctor", folder)
    assert said.code == 0 and f"eos_token_id of {file} is {ROWS}" in " ".join(said.out.split())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", MODELS)
def test_rows_to_spare_are_no_fault(family: str, sound: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(sound / family, tmp_path / "model")
    grow(folder, ROWS - len(WORDS), pad_token="<new0>")
    assert works(folder)
    assert run("doctor", folder).code == 0


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_stand_in_is_named_and_is_no_error(name: str, sound: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(sound / "llama", tmp_path / "model")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    (folder / name).write_text("{}")
    said = run("doctor", folder)
    assert said.code == 0 and "tokenizer-broken" in said.out


@pytest.mark.filterwarnings("ignore")
def test_bytes_need_no_vocabulary(sound: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(sound / "llama", tmp_path / "model")
    (folder / "tokenizer.json").unlink()
    edit(folder / "tokenizer_config.json", tokenizer_class="ByT5Tokenizer")
    assert "tokenizer-broken" not in run("doctor", folder).out
