"""`verify --probe` where the folders' tokenizers pad on other sides: what transformers gives of a padded batch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2ForSequenceClassification

from converter.shipped import shipped
from verify_folders import copy, make_rm, randomised, text_of, verify

TOKENIZER = shipped("fixtures") / "tiny-qwen2-base"
PAIRS = [
    {"prompt": "What is two and two?", "chosen": "Four.", "rejected": "I can't say that at all, can you"},
    {"prompt": "Name a colour", "chosen": "Blue is what I would name", "rejected": "no"},
    {"prompt": "Is water wet", "chosen": "Yes, it is", "rejected": "no"},
]


def make_gpt2(folder: Path) -> Path:
    """A reward model with absolute positions, which padding on the left shifts."""
    config = GPT2Config(vocab_size=384, n_embd=16, n_layer=2, n_head=2, n_positions=128, num_labels=1, pad_token_id=0)
    randomised(GPT2ForSequenceClassification(config)).save_pretrained(folder)
    return folder


def two(make: Any, tmp_path: Path) -> tuple[Path, Path, Path]:
    """A reward model, the same with a tokenizer that pads on the left, and pairs."""
    source = make(tmp_path / "source")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(TOKENIZER / name, source)
    folder = copy(source, tmp_path / "left")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"padding_side": "left"}))
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(p) + "\n" for p in PAIRS))
    return source, folder, tmp_path / "pairs.jsonl"


def ask(capsys: pytest.CaptureFixture[str], source: Path, folder: Path, pairs: Path) -> dict[str, Any]:
    line = [str(folder), "--for", "trl", "--role", "reward", "--probe", str(pairs), "--against", str(source)]
    return verify(capsys, *line)[1]


def test_left_padding_that_moves_scores_is_named_and_the_scores_are_transformers_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, folder, pairs = two(make_gpt2, tmp_path)
    found = ask(capsys, source, folder, pairs)
    listed = text_of(found, "drift").partition("Due to: ")[2]
    assert [part.rpartition(" ")[0] for part in listed.split(", ")] == ["padding side"]
    model = GPT2ForSequenceClassification.from_pretrained(folder).double().eval()
    for side, keys in (("left", ("chosen", "rejected")), ("right", ("source_chosen", "source_rejected"))):
        tokenizer = AutoTokenizer.from_pretrained(folder, padding_side=side)
        for row, pair in zip(found["pairs"], PAIRS, strict=True):
            texts = [
                tokenizer.apply_chat_template(
                    [{"role": "user", "content": pair["prompt"]}, {"role": "assistant", "content": pair[answer]}],
                    tokenize=False,
                )
                for answer in ("chosen", "rejected")
            ]
            rows = [tokenizer(t, add_special_tokens=False)["input_ids"] for t in texts]
            width = max(map(len, rows))
            fill = [[0] * (width - len(r)) for r in rows]
            ids = [f + r if side == "left" else r + f for r, f in zip(rows, fill, strict=True)]
            mask = [
                [0] * len(f) + [1] * len(r) if side == "left" else [1] * len(r) + [0] * len(f)
                for r, f in zip(rows, fill, strict=True)
            ]
            with torch.no_grad():
                given = model(torch.tensor(ids), attention_mask=torch.tensor(mask)).logits[:, 0]
            assert [row[k] for k in keys] == pytest.approx(given.tolist(), abs=1e-6)


def test_left_padding_that_moves_nothing_is_no_drift(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, folder, pairs = two(make_rm, tmp_path)
    found = ask(capsys, source, folder, pairs)
    assert text_of(found, "drift") == ""
    assert any("scores are the source's" in c["text"] for c in found["checks"])


def test_scores_of_rows_that_are_padded_on_the_left_are_numbers_and_those_of_the_right(tmp_path: Path) -> None:
    """The mask of fp64 under a softmax of fp32 made them NaN, and a comparison of NaN holds."""
    from converter.converters.heads.detect import detect
    from converter.converters.heads.read import read
    from converter.core.context import Context
    from converter.examine.verify.values import Reference, padded
    from converter.sources.opening import input_spec, open_checkpoint

    checkpoint = open_checkpoint(input_spec(str(make_rm(tmp_path / "rm"))), token=None, keep_code=False)
    detected = detect(checkpoint)
    assert detected is not None
    reference = Reference(read(checkpoint, detected.dialect, Context(frozenset())))
    batches = padded([[5, 6, 7, 8, 9, 10], [11, 12], [13, 14, 15]], 0)
    left, right = (reference.rewards(batches[side], "last-non-pad", 0) for side in ("left", "right"))
    assert bool(left.isfinite().all())
    assert left.tolist() == pytest.approx(right.tolist(), abs=1e-6)
