"""`verify --against` compares whatever it is given, and fails where it can't: rows of a head, fresh heads, receipts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from converter.cli import main
from verify_folders import SHAPE, WEIGHT, codes, edit, make_rm, randomised, rewrite, text_of, verify


def three_labels(folder: Path) -> Path:
    randomised(LlamaForSequenceClassification(LlamaConfig(num_labels=3, **SHAPE))).save_pretrained(folder)
    return folder


def convert(source: Path, out: Path, *options: str) -> Path:
    assert main(["convert", str(source), str(out), "--to", "trl", "--role", "reward", "-q", *options]) == 0
    return out


@pytest.mark.parametrize(("options", "weights"), [(["--label", "1"], "1"), (["--label-weights=-1,0.5,2"], "0.5")])
def test_a_row_or_a_sum_of_rows_is_the_sources_head(
    options: list[str], weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = three_labels(tmp_path / "rm")
    out = convert(source, tmp_path / "out", *options)
    code, found = verify(capsys, str(out), "--for", "trl", "--against", str(source))
    assert code == 0, found
    heads = [c["text"] for c in found["checks"] if c["label"] == "head"]
    assert any("a sum of those" in t and weights in t for t in heads)
    (out / "rlhf-convert.json").unlink()
    rewrite(out, lambda t: t.update({"score.weight": t["score.weight"] + torch.randn(1, 16) * 0.1}))
    code, found = verify(capsys, str(out), "--for", "trl", "--against", str(source))
    assert code == 4
    assert "head-rows" in codes(found)


def test_a_fresh_head_is_a_note_where_the_receipt_says_so_and_else_a_failure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base"
    randomised(LlamaForCausalLM(LlamaConfig(**SHAPE))).save_pretrained(base)
    out = convert(base, tmp_path / "out", "--init-head", "zeros")
    code, found = verify(capsys, str(out), "--for", "trl", "--against", str(base))
    assert code == 0, found
    assert "head-fresh" in codes(found, "note")
    (out / "rlhf-convert.json").unlink()
    code, found = verify(capsys, str(out), "--for", "trl", "--against", str(base))
    assert code == 4
    assert "head-absent" in codes(found)


def test_a_receipt_of_another_folder_is_compared_tensor_by_tensor(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_rm(tmp_path / "rm")
    out = convert(source, tmp_path / "out")
    receipt = str(out / "rlhf-convert.json")
    copied = tmp_path / "copied"
    copied.mkdir()
    for name in ("config.json", "model.safetensors"):
        (copied / name).write_bytes((out / name).read_bytes())
    assert verify(capsys, str(copied), "--for", "trl", "--against", receipt)[0] == 0
    tensors = load_file(copied / "model.safetensors")
    for change, code in (
        ({WEIGHT: tensors[WEIGHT] * 1.0001}, "values-changed"),
        ({"model.extra.weight": torch.ones(2)}, "tensors-added"),
    ):
        save_file(tensors | change, copied / "model.safetensors", {"format": "pt"})
        status, found = verify(capsys, str(copied), "--for", "trl", "--against", receipt)
        assert status == 4
        assert code in codes(found)
        assert next(iter(change)) in text_of(found, code)


def test_a_receipt_without_checksums_proves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = convert(make_rm(tmp_path / "rm"), tmp_path / "out")
    path = out / "rlhf-convert.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "files"}))
    code, found = verify(capsys, str(out), "--for", "trl", "--against", str(path))
    assert code == 4
    assert "not-compared" in codes(found)
    code, found = verify(capsys, str(out), "--for", "trl")
    assert code == 0
    assert "checksums-missing" in codes(found, "note")


def test_an_edited_config_is_no_other_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = convert(make_rm(tmp_path / "rm"), tmp_path / "out")
    edit(out, use_cache=False)
    assert verify(capsys, str(out), "--for", "trl")[0] == 0
