"""Adapters over a resized or trained vocabulary, in every layout that PEFT saves.

The oracle is what the live PEFT model said in fp32, before it was saved.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import oracle
from new_tokens import RESIZED, VOCABULARY, Cell, cells, make
from oracle.command import merged, run
from oracle.expected import load_output, logits, relative_difference
from selected import each_facet, each_value, one_in

CELLS = [*cells("llama"), *(c for c in cells("gpt2", "gpt_neox", "phi") if c.resized or c.kind.startswith("lora"))]
# PEFT's token rows drop the bias of a tied head (`F.linear(x, W)` in `TrainableTokensLayer`), so that its live model is
# not the one whose weights it saves: phi's has one.
CELLS = [c for c in CELLS if not (c.family == "phi" and c.tied and c.kind.startswith("rows"))]

BY_DEFAULT = each_facet(
    (c for c in CELLS if c.is_saved_whole),
    lambda c: (c.family, c.tied),
    lambda c: (c.kind, c.tied),
    lambda c: (c.kind, c.resized),
    name=lambda c: c.name,
)

TOLERANCE = 1e-2
"""Of bf16 weights; a wrong row or tie is off by more than 0.1."""

WEIGHTS = "adapter_model.safetensors"


def _merge(folder: Path) -> tuple[Any, dict[str, Any]]:
    merged(folder / "adapter", folder / "out", "--base", folder / "base")
    return load_output(folder / "out"), json.loads((folder / "out" / "config.json").read_text())


@pytest.mark.parametrize("cell", one_in(2, BY_DEFAULT))
def test_a_merged_model_says_what_the_live_peft_model_said(cell: Cell, tmp_path: Path) -> None:
    make(cell, tmp_path)
    model, config = _merge(tmp_path)
    live = load_file(tmp_path / "live.safetensors")
    said = logits(model, {"input_ids": live["ids"]})
    assert said.shape == live["logits"].shape
    assert relative_difference(said, live["logits"].double()) < TOLERANCE
    assert config["vocab_size"] == (RESIZED if cell.resized else VOCABULARY)


@pytest.mark.parametrize("cell", [c for c in CELLS if not c.is_saved_whole], ids=lambda c: c.name)
def test_new_rows_of_one_side_that_no_file_holds_are_refused(cell: Cell, tmp_path: Path) -> None:
    """PEFT saves a targeted embedding alone, and the other side of an untied pair keeps rows that were never saved."""
    make(cell, tmp_path)
    ran = run("merge-lora", tmp_path / "adapter", tmp_path / "out", "--base", tmp_path / "base")
    assert ran.code == 3 and "vocab-mismatch" in ran.text and "never saved" in ran.text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("family", "kind", "tied_after"),
    [
        pytest.param(family, kind, tied, marks=() if number == turn else pytest.mark.slow)
        for number, family in enumerate(("llama", "gpt2", "gpt_neox"))
        for turn, (kind, tied) in enumerate([("auto", True), ("rows", True), ("lora-both", False)])
    ],
)
def test_a_tie_stays_where_both_sides_are_one_tensor(family: str, kind: str, tied_after: bool, tmp_path: Path) -> None:
    make(Cell(family, kind, tied=True, resized=True), tmp_path)
    _, config = _merge(tmp_path)
    assert config.get("tie_word_embeddings", True) is tied_after


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_two_copies_that_differ_are_refused(family: str, tmp_path: Path) -> None:
    make(Cell(family, "save-both", tied=False, resized=True), tmp_path)
    file = tmp_path / "adapter" / WEIGHTS
    tensors = load_file(file)
    key = next(k for k in tensors if k.endswith("lm_head.weight"))
    save_file(tensors | {key: tensors[key] + 1}, file, {"format": "pt"})
    ran = run("merge-lora", tmp_path / "adapter", tmp_path / "out", "--base", tmp_path / "base")
    assert ran.code == 3 and "adapter-key-twice" in ran.text and "differ" in ran.text


def test_every_key_is_merged_or_named_as_left_out(tmp_path: Path) -> None:
    """Of six tensors of two embeddings two are trained; copies and what was below them are listed in the receipt."""
    make(Cell("llama", "save-both", tied=True, resized=True), tmp_path)
    _merge(tmp_path)
    dropped = json.loads((tmp_path / "out" / "rlhf-convert.json").read_text())["dropped"]
    for module in ("model.embed_tokens", "lm_head"):
        assert f"base_model.model.{module}.original_module.weight" in dropped
        assert f"base_model.model.{module}.weight" in dropped


@pytest.mark.parametrize(("family", "tied"), each_value(["llama", "qwen2", "gemma2"], [True, False]))
def test_a_reward_model_over_a_resized_vocabulary_needs_no_output_rows(family: str, tied: bool, tmp_path: Path) -> None:
    """Its output embedding goes; only the input embedding has to be of the new size."""
    base = oracle.make_base(tmp_path / "base", family, tied=tied)

    def resize(model: Any) -> Any:
        generator = torch.Generator().manual_seed(8)
        model.resize_token_embeddings(RESIZED, mean_resizing=False)
        rows = model.get_input_embeddings().weight
        with torch.no_grad():
            rows[VOCABULARY:] = torch.randn(rows[VOCABULARY:].shape, generator=generator).to(rows.dtype)
        return model

    adapter = oracle.make_adapter(tmp_path / "adapter", base, task="SEQ_CLS", prepare=resize)
    merged(adapter, tmp_path / "out", "--base", base.path)
    model = load_output(tmp_path / "out", "AutoModelForSequenceClassification")
    inputs = {"input_ids": torch.arange(140, RESIZED)[None]}
    expected = oracle.peft_logits(base, adapter, task="SEQ_CLS", prepare=resize, inputs=inputs)
    assert relative_difference(logits(model, inputs), expected) < TOLERANCE
    assert model.config.vocab_size == RESIZED
