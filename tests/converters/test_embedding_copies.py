"""Output embeddings that an adapter changes: copies that PEFT saves beside LoRA, ties that come apart with others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import oracle
from healthy.shrink import build
from oracle.adapters import adapter_tensors
from oracle.bases import quiet
from oracle.command import merged
from oracle.expected import inputs_for
from oracle.families import marked
from oracle.methods import EncoderBase

CLOSE = 4e-6


@pytest.mark.parametrize(("family", "start"), [("llama", "pissa"), ("llama", "olora"), ("gpt2", "pissa")])
def test_a_copy_of_the_weight_that_was_saved_moved_is_not_moved_again(family: str, start: str, tmp_path: Path) -> None:
    """PEFT saves the head below LoRA where embeddings are trained; PiSSA and OLoRA have moved that one already."""
    base = oracle.make_base(tmp_path / "base", family)
    targets = ["lm_head", base.targets[0]]
    adapter = oracle.make_adapter(
        tmp_path / "adapter", base, target_modules=targets, init_lora_weights=start, noise=0.02
    )
    assert any(n.endswith("lm_head.base_layer.weight") for n in adapter_tensors(adapter))
    merged(adapter, tmp_path / "out", "--base", base.path)
    forward = oracle.peft_logits(base, adapter)
    assert oracle.effect(base, forward) > 0.01
    said = oracle.logits(oracle.load_output(tmp_path / "out"), inputs_for(base))
    assert oracle.relative_difference(said, forward) < CLOSE


def test_a_copy_of_an_embedding_under_a_name_of_its_own_takes_the_bases_place(tmp_path: Path) -> None:
    """Mamba's embedding is `embeddings`, as many a module is called that holds several things."""
    with quiet():
        build("causal", "mamba").save_pretrained(tmp_path / "base")
    base = EncoderBase(tmp_path / "base", "mamba", tied=True)
    adapter = oracle.make_adapter(tmp_path / "adapter", base, target_modules=["in_proj", "embeddings", "lm_head"])
    assert any(n.endswith("embeddings.base_layer.weight") for n in adapter_tensors(adapter))
    merged(adapter, tmp_path / "out", "--base", base.path)
    inputs = {"input_ids": inputs_for(base)["input_ids"] % 90 + 4}
    forward = oracle.peft_logits(base, adapter, inputs=inputs)
    said = oracle.logits(oracle.load_output(tmp_path / "out"), inputs)
    assert oracle.relative_difference(said, forward) < CLOSE


MASKED: dict[str, dict[str, Any]] = {
    "bert": {"target_modules": ["query", "decoder"]},
    "roberta": {"target_modules": ["query", "decoder"], "lora_bias": True},
    "camembert": {"target_modules": ["query"], "modules_to_save": ["word_embeddings"]},
    "big_bird": {"target_modules": ["query", "decoder"], "use_dora": True},
    "deberta": {"target_modules": ["in_proj", "word_embeddings"]},
}


@pytest.mark.parametrize("kind", marked(MASKED, {"bert", "roberta"}))
def test_the_bias_of_an_untied_output_embedding_is_stored_with_it(kind: str, tmp_path: Path) -> None:
    """BERT's decoder has its bias by a tie too, which goes by the same word of the config."""
    with quiet():
        build("masked", kind).save_pretrained(tmp_path / "base")
    base = EncoderBase(tmp_path / "base", kind, tied=True, auto="AutoModelForMaskedLM")
    adapter = oracle.make_adapter(tmp_path / "adapter", base, **MASKED[kind])
    merged(adapter, tmp_path / "out", "--base", base.path)
    inputs = {"input_ids": inputs_for(base)["input_ids"] % 90 + 4}
    forward = oracle.peft_logits(base, adapter, inputs=inputs)
    assert oracle.effect(base, forward, inputs=inputs) > 0.01
    said = oracle.logits(oracle.load_output(tmp_path / "out", base.auto), inputs)
    assert oracle.relative_difference(said, forward) < CLOSE
