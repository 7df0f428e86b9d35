"""Ties inside composite models, where the config of a part chooses the part's class; against transformers' own keys."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import transformers

from converter.families.ties import find_ties, is_tied, untied
from oracle.bases import quiet

GPT2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 32, "add_cross_attention": True}
BERT = {
    "model_type": "bert", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "vocab_size": 32,
}  # fmt: skip
TROCR = {
    "model_type": "trocr", "d_model": 16, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 32,
    "vocab_size": 32,
}  # fmt: skip
DECODER = {"is_decoder": True, "add_cross_attention": True}
VIT = BERT | {"model_type": "vit", "image_size": 8, "patch_size": 4}
WAV = BERT | {"model_type": "wav2vec2", "conv_dim": [16], "conv_stride": [2], "conv_kernel": [4]}
T5 = {
    "model_type": "t5", "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 32,
    "decoder_start_token_id": 0,
}  # fmt: skip
COMPOSED: dict[str, tuple[str, dict[str, Any]]] = {
    "text-bert": ("EncoderDecoderModel", {"encoder": BERT, "decoder": BERT | DECODER}),
    "text-gpt2": ("EncoderDecoderModel", {"encoder": BERT, "decoder": GPT2}),
    "text-gpt2-untied": ("EncoderDecoderModel", {"encoder": BERT, "decoder": GPT2 | {"tie_word_embeddings": False}}),
    "vision-gpt2": ("VisionEncoderDecoderModel", {"encoder": VIT, "decoder": GPT2}),
    "vision-bert": ("VisionEncoderDecoderModel", {"encoder": VIT, "decoder": BERT | DECODER}),
    "vision-trocr": ("VisionEncoderDecoderModel", {"encoder": VIT, "decoder": TROCR | DECODER}),
    "vision-roberta": (
        "VisionEncoderDecoderModel", {"encoder": VIT, "decoder": BERT | DECODER | {"model_type": "roberta"}}
    ),
    "speech-gpt2": ("SpeechEncoderDecoderModel", {"encoder": WAV, "decoder": GPT2}),
    "blip2-t5": ("Blip2ForConditionalGeneration", {"text_config": T5}),
    "blip2-gpt2": ("Blip2ForConditionalGeneration", {"text_config": GPT2}),
    "bark-fine": ("BarkFineModel", {}),
    "bark": ("BarkModel", {}),
    "bart-classifier": ("BartForSequenceClassification", {}),
    "t5-classifier": ("T5ForSequenceClassification", {}),
    "rag": ("RagTokenForGeneration", {}),
}  # fmt: skip


@pytest.fixture(scope="module", params=COMPOSED)
def composed(request: pytest.FixtureRequest) -> tuple[Any, dict[str, Any]]:
    """A model on the meta device, and its config as config.json has it."""
    from make_memory_names import build, model_classes

    name, parts = COMPOSED[request.param]
    cls = getattr(transformers, name, None) or model_classes()[name]
    with quiet(), torch.device("meta"):
        model = cls(cls.config_class(**json.loads(json.dumps(parts)))) if parts else build(cls)
    assert model is not None
    config = json.loads(model.config.to_json_string(use_diff=False))
    return model, config | {"architectures": [name]}


def of_transformers(model: Any) -> set[frozenset[str]]:
    found: dict[str, set[str]] = {}
    for target, source in model.get_expanded_tied_weights_keys(all_submodels=True).items():
        found.setdefault(source, {source}).add(target)
    return {frozenset(names) for names in found.values()}


def test_ties_of_a_composite_model_are_transformers_own(composed: tuple[Any, dict[str, Any]]) -> None:
    model, config = composed
    assert {frozenset(group) for group in find_ties([*model.state_dict()], config)} == of_transformers(model)


def test_a_part_that_is_silent_and_ties_is_untied_by_its_own_config() -> None:
    silent = {"model_type": "vision-encoder-decoder", "encoder": VIT, "decoder": GPT2}
    assert is_tied(GPT2)
    assert untied(silent)["decoder"]["tie_word_embeddings"] is False
