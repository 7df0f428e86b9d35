"""`extract-lora` of a model whose vocabulary grew: embeddings whole, and what the tuned model says, in PEFT too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

import converter
import oracle
from converter.errors import Refused
from oracle.bases import VOCAB, quiet

GROWN = VOCAB + 3


def tuned(base: oracle.Base, folder: Path) -> Any:
    """Three tokens more, two ranks of change in each query."""
    generator = torch.Generator().manual_seed(4)
    with quiet():
        model = base.load()
        model.resize_token_embeddings(GROWN)
        for name, value in model.named_parameters():
            if "q_proj.weight" in name:
                left, right = (torch.randn(n, generator=generator) for n in ((value.shape[0], 2), (2, value.shape[1])))
                value.data += left @ right / 20
            elif "embed_tokens" in name:
                value.data[-5:] += torch.randn(value[-5:].shape, generator=generator) / 4
        model.save_pretrained(folder)
    return model


@torch.no_grad()
def say(model: Any) -> torch.Tensor:
    found: torch.Tensor = model.eval()(torch.tensor([[5, GROWN - 1, GROWN - 2, 9]])).logits
    return found


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_embeddings_with_more_tokens_are_kept_whole(tied: bool, tmp_path: Path) -> None:
    base = oracle.make_base(tmp_path / "base", tied=tied)
    wanted = say(tuned(base, tmp_path / "tuned"))
    made = converter.extract_lora(base.path, tmp_path / "tuned", tmp_path / "adapter", rank=2)
    assert [n.code for n in made.notes] == ["vocabulary-grew"]
    converter.merge_lora(tmp_path / "adapter", tmp_path / "merged", base=base.path)
    with quiet():
        merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        resized = base.load()
        resized.resize_token_embeddings(GROWN)
        loaded = peft.PeftModel.from_pretrained(resized, tmp_path / "adapter")
    assert merged.config.vocab_size == GROWN
    for found in (say(merged), say(loaded)):
        assert oracle.relative_difference(found, wanted) < 1e-5


def test_a_vocabulary_that_was_cut_is_refused(tmp_path: Path) -> None:
    base = oracle.make_base(tmp_path / "base")
    tuned(base, tmp_path / "tuned")
    whole = oracle.Base(tmp_path / "tuned", "llama", tied=False)
    with pytest.raises(Refused, match="changes values and no shapes") as caught:
        converter.extract_lora(whole.path, base.path, tmp_path / "adapter", rank=2)
    assert caught.value.code == "models-differ"
