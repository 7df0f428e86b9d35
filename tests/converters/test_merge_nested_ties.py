"""Adapters on an output embedding that a part of a composite model ties; the truth is PEFT's live model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from oracle.bases import quiet
from oracle.command import merged

SMALL: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 32,
}  # fmt: skip
IDS = torch.tensor([[3, 5, 7, 11]])


def gpt2() -> Any:
    return transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32, add_cross_attention=True)


def bert(**more: Any) -> Any:
    return transformers.BertConfig(**SMALL, **more)


def text_and_gpt2() -> Any:
    made = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(bert(), gpt2())
    return transformers.EncoderDecoderModel(made)


def text_and_bert() -> Any:
    decoder = bert(is_decoder=True, add_cross_attention=True)
    return transformers.EncoderDecoderModel(
        transformers.EncoderDecoderConfig.from_encoder_decoder_configs(bert(), decoder)
    )


def vision_and_trocr() -> Any:
    seeing = transformers.ViTConfig(**{k: v for k, v in SMALL.items() if k != "vocab_size"}, image_size=8, patch_size=4)
    decoder = transformers.TrOCRConfig(
        d_model=16, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=32, vocab_size=32, is_decoder=True,
        add_cross_attention=True, tie_word_embeddings=True,
    )  # fmt: skip
    made = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(seeing, decoder)
    return transformers.VisionEncoderDecoderModel(made)


def bark_fine() -> Any:
    from transformers.models.bark import BarkFineConfig, BarkFineModel

    sizes = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "block_size": 8}
    return BarkFineModel(BarkFineConfig(**sizes, input_vocab_size=32, output_vocab_size=32, n_codes_total=3))


def text(model: Any) -> torch.Tensor:
    return model(input_ids=IDS, decoder_input_ids=IDS.flip(1)).logits


def vision(model: Any) -> torch.Tensor:
    pixels = torch.linspace(-1, 1, 192).reshape(1, 3, 8, 8)
    return model(pixel_values=pixels, decoder_input_ids=IDS).logits


def codes(model: Any) -> torch.Tensor:
    inner = getattr(getattr(model, "base_model", model), "model", model)
    return inner(codebook_idx=2, input_ids=IDS[..., None].repeat(1, 1, 3)).logits


MODELS: dict[str, tuple[Any, Any, str]] = {
    "encoder-decoder-gpt2": (text_and_gpt2, text, "lm_head"),
    "encoder-decoder-bert": (text_and_bert, text, "predictions.decoder"),
    "vision-trocr": (vision_and_trocr, vision, "output_projection"),
    "bark-fine": (bark_fine, codes, "lm_heads.1"),
}


@pytest.mark.parametrize("way", ["lora", "saved"])
@pytest.mark.parametrize("name", MODELS)
def test_adapter_on_the_tied_output_of_a_part_says_what_peft_says(name: str, way: str, tmp_path: Path) -> None:
    make, forward, head = MODELS[name]
    with quiet():
        torch.manual_seed(3)
        make().save_pretrained(tmp_path / "base")
        model = type(make()).from_pretrained(tmp_path / "base").eval()
        attention = "c_attn" if "gpt2" in name else "attention.self.query" if "bert" in name else "q_proj"
        target = "att_proj" if name == "bark-fine" else attention
        settings = {"target_modules": [target, head]} if way == "lora" else {
            "target_modules": [target], "modules_to_save": [head]}  # fmt: skip
        live = get_peft_model(model, LoraConfig(**settings, r=2, init_lora_weights=False)).eval()
        with torch.no_grad():
            for key, parameter in live.named_parameters():
                if "modules_to_save" in key:
                    parameter.add_(0.2 * torch.randn_like(parameter))
            before, expected = forward(type(model).from_pretrained(tmp_path / "base").eval()), forward(live)
        live.save_pretrained(tmp_path / "adapter")
    assert not torch.allclose(before, expected, atol=1e-3)
    merged(tmp_path / "adapter", tmp_path / "out", "--base", tmp_path / "base")
    with quiet(), torch.no_grad():
        again, told = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
        found = forward(again.eval())
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
