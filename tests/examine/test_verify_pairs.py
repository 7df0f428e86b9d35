"""`verify --probe` scores pairs as transformers does, and says what moved the scores."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaForSequenceClassification

from converter.shipped import shipped
from verify_folders import WEIGHT, codes, copy, make_rm, rewrite, text_of, verify

TOKENIZER = shipped("fixtures") / "tiny-qwen2-base"
PAIRS = [
    {"prompt": "What is two and two?", "chosen": "Four.", "rejected": "I can't say."},
    {"prompt": "Name a colour", "chosen": "Blue", "rejected": "Blue is not what I would name here"},
    {"prompt": "Is water wet", "chosen": "Yes, it is", "rejected": "no"},
]


@pytest.fixture(scope="module")
def rm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model that transformers saved."""
    return make_rm(tmp_path_factory.mktemp("rm") / "rm")


@pytest.fixture
def scored(rm: Path, tmp_path: Path) -> tuple[Path, Path]:
    """The reward model with a tokenizer, and a file of pairs."""
    folder = with_tokenizer(copy(rm, tmp_path / "scored"))
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(p) + "\n" for p in PAIRS))
    return folder, tmp_path / "pairs.jsonl"


def with_tokenizer(folder: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(TOKENIZER / name, folder)
    return folder


def ask(capsys: pytest.CaptureFixture[str], folder: Path, pairs: Path, *more: str) -> tuple[int, dict[str, Any]]:
    return verify(capsys, str(folder), "--for", "trl", "--role", "reward", "--probe", str(pairs), *more)


def test_scores_are_those_that_transformers_gives(
    scored: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, pairs = scored
    code, found = ask(capsys, folder, pairs)
    assert code == 0
    model = LlamaForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for row, pair in zip(found["pairs"], PAIRS, strict=True):
        for side in ("chosen", "rejected"):
            messages = [{"role": "user", "content": pair["prompt"]}, {"role": "assistant", "content": pair[side]}]
            text = tokenizer.apply_chat_template(messages, tokenize=False)
            ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
            with torch.no_grad():
                assert row[side] == pytest.approx(model(ids).logits.item(), abs=1e-4)
    right = sum(row["chosen"] > row["rejected"] for row in found["pairs"])
    assert any(f"{right} of 3 pairs" in c["text"] for c in found["checks"])


@pytest.mark.parametrize(
    ("change", "cause"),
    [("head", "head"), ("base", "base"), ("template", "template"), ("nothing", "")],
)
def test_a_drift_is_put_down_to_what_was_changed(
    scored: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], change: str, cause: str
) -> None:
    source, pairs = scored
    folder = copy(source, tmp_path / "changed")

    def double(tensors: dict[str, torch.Tensor]) -> None:
        name = "score.weight" if change == "head" else WEIGHT
        tensors[name] = tensors[name].flip(-1).contiguous()

    if change in ("head", "base"):
        rewrite(folder, double)
    elif change == "template":
        (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }} {% endfor %}")
    _, found = ask(capsys, folder, pairs, "--against", str(source))
    if not cause:
        assert "drift" not in codes(found, "note")
        return
    told = text_of(found, "drift")
    causes = [
        c
        for c in ("template", "base", "head", "normalisation", "pad token")
        if f"{c} " in told.partition("Due to: ")[2]
    ]
    assert causes == [cause]


def test_a_line_that_is_no_pair_is_a_usage_error(scored: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    from converter.cli import main

    folder, pairs = scored
    pairs.write_text('{"prompt": "x", "chosen": "y"}\n')
    assert main(["verify", str(folder), "--for", "trl", "--role", "reward", "--probe", str(pairs)]) == 2
    assert "line 1" in capsys.readouterr().err
