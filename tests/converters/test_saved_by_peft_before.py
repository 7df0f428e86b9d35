"""What earlier releases of PEFT saved otherwise, or did not save: merged as their live models were, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, OFTConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    UMT5Config,
    UMT5ForConditionalGeneration,
)

import converter
from converter.errors import Refused

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

TEXT: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "vocab_size": 32,
}  # fmt: skip
T5: dict[str, Any] = {"vocab_size": 32, "d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 2, "num_heads": 2}
IDS = {"input_ids": torch.arange(3, 19).reshape(2, 8), "decoder_input_ids": torch.arange(4, 20).reshape(2, 8)}


def kept(model: Any, folder: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    for name, value in model.named_parameters():
        drawn = torch.randn(value.shape, generator=generator)
        value.data = drawn / value.shape[-1] ** 0.5 if value.dim() > 1 else drawn / 9 + name.endswith("weight")
    model.save_pretrained(folder)
    return folder


def trained(model: Any, config: Any, folder: Path) -> Any:
    """The live model, after its adapter was saved."""
    live = get_peft_model(model, config).eval()
    generator = torch.Generator().manual_seed(1)
    for value in live.parameters():
        if value.requires_grad:
            value.data += torch.randn(value.shape, generator=generator) / 4
    live.save_pretrained(folder)
    return live


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def without(folder: Path, part: str) -> None:
    path = folder / "adapter_model.safetensors"
    save_file({n: t for n, t in load_file(path).items() if part not in n}, path)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for p in folder.glob("*.safetensors") for n, t in load_file(p).items()}


def expect_logits(out: Path, live: Any, kind: Any) -> None:
    with torch.no_grad():
        said, expected = kind.from_pretrained(out).eval()(**IDS).logits, live(**IDS).logits
    torch.testing.assert_close(said, expected, atol=1e-5, rtol=1e-5)


# OFT before 0.16


OUTPUTS_ROTATED = [
    [-1.318824, -1.164706, -1.010588, -0.856471], [-0.18, -0.2, -0.22, -0.24],
    [-0.135294, -0.058824, 0.017647, 0.094118], [-0.092941, -0.091765, -0.090588, -0.089412],
    [0.709412, 0.877647, 1.045882, 1.214118], [0.747059, 0.788235, 0.829412, 0.870588],
]  # fmt: skip
"""What `(arange(24) - 11) / 10` is with PEFT 0.13.2: the live layer's answers to the unit matrix."""

INPUTS_ROTATED = [
    [-1.441177, -0.364706, -1.170588, -0.282353], [-1.0125, -0.225, -0.708088, -0.132353],
    [-0.448529, -0.044118, -0.110294, 0.058824], [0.250735, 0.177941, 0.622794, 0.291176],
    [1.085294, 0.441177, 1.491176, 0.564706], [2.055147, 0.745588, 2.494853, 0.879412],
]  # fmt: skip
"""The same with PEFT 0.15.2, which scales outputs too."""


SERIES = {
    "0.17.1": [
        [-0.7, -1.325, -0.754687, -0.829687], [-0.45, -0.7875, -0.442187, -0.417188],
        [-0.2, -0.25, -0.129688, -0.004687], [0.05, 0.2875, 0.182813, 0.407813], [0.3, 0.825, 0.495312, 0.820312],
        [0.55, 1.3625, 0.807812, 1.232813],
    ],
    "0.21.2": [
        [-0.334375, -1.253125, -1.036719, -0.705469], [-0.209375, -0.709375, -0.630469, -0.374219],
        [-0.084375, -0.165625, -0.224219, -0.042969], [0.040625, 0.378125, 0.182031, 0.288281],
        [0.165625, 0.921875, 0.588281, 0.619531], [0.290625, 1.465625, 0.994531, 0.950781],
    ],
}  # fmt: skip
"""The same with `oft_R` and five terms of the series, by release."""


@pytest.mark.parametrize(
    ("block", "scale", "expected"),
    [(3, None, OUTPUTS_ROTATED), (2, 1 + torch.arange(6.0).reshape(6, 1) / 8, INPUTS_ROTATED)],
    ids=["0.13", "0.15"],
)
def test_oft_of_whole_matrices_is_what_its_release_ran(
    tmp_path: Path, block: int, scale: torch.Tensor | None, expected: list[list[float]]
) -> None:
    tensors = {"oft_r": (torch.arange(2.0 * block * block).reshape(2, block, block) * 7 % 5 - 2) / 4}
    tensors |= {} if scale is None else {"oft_s": scale}
    assert_rotated(tmp_path, tensors, expected)


@pytest.mark.parametrize("release", SERIES)
def test_the_series_of_oft_is_that_of_the_release_that_saved_it(tmp_path: Path, release: str) -> None:
    tensors = {"oft_R.weight": (torch.arange(6.0).reshape(1, 6) * 7 % 5 - 2) / 4}
    said = {"peft_version": release} if release == "0.21.2" else {}  # PEFT writes its version since 0.18
    assert_rotated(tmp_path, tensors, SERIES[release], **said)


def assert_rotated(folder: Path, tensors: dict[str, torch.Tensor], expected: list[list[float]], **said: str) -> None:
    sizes = {"hidden_size": 4, "intermediate_size": 6, "num_attention_heads": 1, "num_key_value_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(**{**TEXT, **sizes, "num_hidden_layers": 1}))
    model.model.layers[0].mlp.up_proj.weight.data = (torch.arange(24.0).reshape(6, 4) - 11) / 10
    model.save_pretrained(folder / "base")
    config = OFTConfig(r=2, oft_block_size=0, target_modules=["up_proj"], use_cayley_neumann=True)
    get_peft_model(model, config).save_pretrained(folder / "adapter")
    key = "base_model.model.model.layers.0.mlp.up_proj."
    save_file({f"{key}{n}": t for n, t in tensors.items()}, folder / "adapter" / "adapter_model.safetensors")
    path = folder / "adapter" / "adapter_config.json"
    value = {k: v for k, v in json.loads(path.read_text()).items() if k != "peft_version"}
    path.write_text(json.dumps(value | said))
    converter.merge_lora(folder / "adapter", folder / "out", base=folder / "base")
    found = weights(folder / "out")["model.layers.0.mlp.up_proj.weight"]
    torch.testing.assert_close(found, torch.tensor(expected), atol=2e-6, rtol=0)


# Biases that were trained and not saved


def test_trained_biases_that_the_adapter_does_not_hold_are_refused_until_it_is_said(tmp_path: Path) -> None:
    base = kept(Qwen2ForCausalLM(Qwen2Config(**TEXT)), tmp_path / "base")
    config = LoraConfig(r=2, bias="lora_only", target_modules=["q_proj", "o_proj"])
    trained(Qwen2ForCausalLM.from_pretrained(base), config, tmp_path / "adapter")
    without(tmp_path / "adapter", "base_layer.bias")  # as PEFT before 0.21 saves it
    with pytest.raises(Refused, match=r"layers\.\{0\.\.1\}\.self_attn\.q_proj were trained") as caught:
        converter.merge_lora(tmp_path / "adapter", tmp_path / "out", base=base)
    assert caught.value.code == "adapter-biases-lost"
    assert not (tmp_path / "out").exists()
    converter.merge_lora(tmp_path / "adapter", tmp_path / "out", base=base, allow=("adapter-biases-lost",))
    name = "model.layers.0.self_attn.q_proj.bias"
    assert torch.equal(weights(tmp_path / "out")[name], weights(base)[name])


# What configs did not list


def test_a_classifier_that_the_config_does_not_list_is_the_head_of_its_task(tmp_path: Path) -> None:
    base = kept(BertForSequenceClassification(BertConfig(**TEXT, num_labels=3)), tmp_path / "base")
    config = LoraConfig(r=2, task_type="SEQ_CLS", target_modules=["query"])
    live = trained(BertForSequenceClassification.from_pretrained(base), config, tmp_path / "adapter")
    edit(tmp_path / "adapter", modules_to_save=None)  # as PEFT 0.10 to 0.13 write it
    converter.merge_lora(tmp_path / "adapter", tmp_path / "out", base=base)
    with torch.no_grad():
        said = BertForSequenceClassification.from_pretrained(tmp_path / "out").eval()(IDS["input_ids"]).logits
        torch.testing.assert_close(said, live(IDS["input_ids"]).logits)


@pytest.mark.parametrize("change", [0.0, 0.5], ids=["same", "differ"])
def test_factors_inside_a_module_that_is_saved_whole_are_there_twice(tmp_path: Path, change: float) -> None:
    """`dense` names a layer of RoBERTa's classifier too: PEFT 0.10 to 0.13 copy it with its factors."""
    base = kept(RobertaForSequenceClassification(RobertaConfig(**TEXT, num_labels=3)), tmp_path / "base")
    config = LoraConfig(r=2, lora_alpha=6, task_type="SEQ_CLS", target_modules=["query"])
    trained(RobertaForSequenceClassification.from_pretrained(base), config, tmp_path / "adapter")
    path, head = tmp_path / "adapter" / "adapter_model.safetensors", "base_model.model.classifier"
    a, b, weight = torch.randn(2, 16), torch.randn(16, 2), torch.randn(16, 16)
    held = {n: t for n, t in load_file(path).items() if ".dense." not in n}
    held |= {f"{head}.dense.base_layer.weight": weight, f"{head}.dense.base_layer.bias": torch.ones(16)}
    held |= {f"{head}{where}.dense.lora_A.weight": a.clone() for where in ("", ".modules_to_save", ".original_module")}
    held |= {f"{head}.dense.lora_B.weight": b, f"{head}.modules_to_save.dense.lora_B.weight": b + change}
    save_file(held | {f"{head}.original_module.dense.lora_B.weight": torch.zeros(16, 2)}, path)
    edit(tmp_path / "adapter", target_modules=["query", "classifier.dense"])
    if change:
        with pytest.raises(Refused) as caught:
            converter.merge_lora(tmp_path / "adapter", tmp_path / "out", base=base)
        assert caught.value.code == "adapter-key-twice"
        return
    converter.merge_lora(tmp_path / "adapter", tmp_path / "out", base=base)
    found = weights(tmp_path / "out")
    torch.testing.assert_close(found["classifier.dense.weight"], weight + 3 * b @ a)
    assert torch.equal(found["classifier.dense.bias"], torch.ones(16))


# T5


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return kept(T5ForConditionalGeneration(T5Config(**T5)), tmp_path_factory.mktemp("t5") / "base")


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=2, target_modules=["q"], modules_to_save=["lm_head"]),
        LoraConfig(r=2, target_modules=["q", "lm_head"]),
    ],
    ids=["saved", "lora"],
)
def test_t5_whose_tie_comes_apart_says_what_the_live_model_says(t5: Path, tmp_path: Path, config: Any) -> None:
    """Its decoder's outputs are divided by the root of `d_model` only where the config ties embeddings."""
    live = trained(T5ForConditionalGeneration.from_pretrained(t5), config, tmp_path / "adapter")
    converter.merge_lora(tmp_path / "adapter", tmp_path / "out", base=t5)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    expect_logits(tmp_path / "out", live, T5ForConditionalGeneration)


def test_a_tie_whose_scale_depends_on_the_release_is_not_taken_apart(tmp_path: Path) -> None:
    base = kept(UMT5ForConditionalGeneration(UMT5Config(**T5)), tmp_path / "base")
    config = LoraConfig(r=2, target_modules=["q"], modules_to_save=["lm_head"])
    trained(UMT5ForConditionalGeneration.from_pretrained(base), config, tmp_path / "adapter")
    with pytest.raises(Refused) as caught:
        converter.merge_lora(tmp_path / "adapter", tmp_path / "out", base=base)
    assert caught.value.code == "tied-scale"


def test_of_two_numbers_in_a_name_a_release_may_have_taken_the_last_for_the_layer(t5: Path, tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=r".*\.layer\.1\..*\.(q|wi)")
    live = trained(T5ForConditionalGeneration.from_pretrained(t5), config, tmp_path / "adapter")
    edit(tmp_path / "adapter", target_modules=["q", "wi"], layers_to_transform=[1])  # what PEFT 0.10 makes those of
    converter.merge_lora(tmp_path / "adapter", tmp_path / "out", base=t5)
    expect_logits(tmp_path / "out", live, T5ForConditionalGeneration)


def test_every_bias_is_what_has_that_word_in_its_name(t5: Path, tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["q"], bias="all")
    live = trained(T5ForConditionalGeneration.from_pretrained(t5), config, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tables = {n: p for n, p in live.named_parameters() if "relative_attention_bias" in n}
    for table in tables.values():
        table.data += 1 / (1 + torch.arange(table.numel()).reshape(table.shape))
    save_file(load_file(path) | {n: p.data for n, p in tables.items()}, path)  # as PEFT before 0.21 saves it
    converter.merge_lora(tmp_path / "adapter", tmp_path / "out", base=t5)
    expect_logits(tmp_path / "out", live, T5ForConditionalGeneration)
