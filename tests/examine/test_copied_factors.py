"""A factor of an adapter that lies over another module's is named: no training makes two alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoHaConfig, LoraConfig, VeraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

from converter.diagnostic import Diagnostic
from converter.examine.doctor import DoctorRequest, examine

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft's call

SMALL = {"vocab_size": 24, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
MODELS: dict[str, Any] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, intermediate_size=20)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=24, n_embd=16, n_layer=3, n_head=2, n_positions=16)),
    "neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL, intermediate_size=20)),
}
TARGETS = {"llama": ["q_proj", "k_proj", "o_proj"], "gpt2": ["c_attn", "c_proj"], "neox": ["query_key_value", "dense"]}


def saved(family: str, folder: Path, config: Any) -> dict[str, torch.Tensor]:
    """An adapter after one step of training."""
    torch.manual_seed(5)
    model = get_peft_model(MODELS[family](), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        model(input_ids=torch.arange(8)[None]).logits.square().mean().backward()
        optimizer.step()
    model.save_pretrained(folder)
    return load_file(folder / "adapter_model.safetensors")


def said_of(folder: Path) -> list[Diagnostic]:
    return [f for f in examine(DoctorRequest(str(folder), deep=True)).findings if f.code == "copied-tensors"]


def ends(tensors: dict[str, torch.Tensor], layer: int, end: str) -> list[str]:
    return sorted(n for n in tensors if f".{layer}." in n and n.endswith(end))


@pytest.mark.parametrize("is_pair", [True, False])
@pytest.mark.parametrize("family", MODELS)
def test_a_factor_over_that_of_another_layer_is_named(family: str, is_pair: bool, tmp_path: Path) -> None:
    tensors = saved(family, tmp_path, LoraConfig(r=4, target_modules=TARGETS[family], fan_in_fan_out=family == "gpt2"))
    assert said_of(tmp_path) == []
    first, second = (ends(tensors, n, "lora_B.weight")[0] for n in (0, 2))
    tensors[second] = tensors[first].clone()
    if is_pair:
        a, b = (n.replace("lora_B", "lora_A") for n in (first, second))
        tensors[b] = tensors[a].clone()
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    (found,) = said_of(tmp_path)
    assert (found.severity, found.tensors) == ("changes-numbers", (first, second))


def test_a_factor_of_another_method_is_named_too(tmp_path: Path) -> None:
    tensors = saved("llama", tmp_path, LoHaConfig(r=4, target_modules=TARGETS["llama"]))
    assert said_of(tmp_path) == []
    first, second = (ends(tensors, n, "hada_w2_b")[0] for n in (0, 1))
    tensors[second] = tensors[first].clone()
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    assert [f.tensors for f in said_of(tmp_path)] == [(first, second)]


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=4, target_modules=TARGETS["llama"], layer_replication=[(0, 2), (1, 3)]),
        VeraConfig(r=4, target_modules=["q_proj"], save_projection=True),
        LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa"),
    ],
    ids=["replicated", "shared", "pissa"],
)
def test_sound_adapters_are_left_in_peace(config: Any, tmp_path: Path) -> None:
    saved("llama", tmp_path, config)
    assert said_of(tmp_path) == []


def test_drawn_factors_may_be_alike(tmp_path: Path) -> None:
    """Two modules of one shape whose generator was seeded anew."""
    tensors = saved("llama", tmp_path, LoraConfig(r=4, target_modules=TARGETS["llama"]))
    first, second = (ends(tensors, n, "lora_A.weight")[0] for n in (0, 1))
    save_file({**tensors, second: tensors[first].clone()}, tmp_path / "adapter_model.safetensors")
    assert said_of(tmp_path) == []


def test_a_factor_that_experts_share_is_no_copy(tmp_path: Path) -> None:
    """As Tinker trains it: one side of an expert's pair is the same in all experts of a layer."""
    tensors = saved("llama", tmp_path, LoraConfig(r=4, target_modules=["q_proj", "k_proj"]))
    names = {n: n.replace("self_attn.q_proj", "mlp.experts.0.down_proj") for n in tensors}
    tensors = {names[n]: t for n, t in tensors.items()}
    more = {n.replace("experts.0.", "experts.1."): t.clone() for n, t in tensors.items() if "experts" in n}
    more |= {n.replace("experts.0.down", "experts.1.up"): t + 1 for n, t in tensors.items() if "experts" in n}
    save_file({**tensors, **more}, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    assert said_of(tmp_path) == []


def test_an_adapter_whose_layers_were_copied_whole_is_a_hint(tmp_path: Path) -> None:
    tensors = saved("llama", tmp_path, LoraConfig(r=4, target_modules=TARGETS["llama"]))
    copies = {n.replace("layers.0.", "layers.1."): t.clone() for n, t in tensors.items() if "layers.0." in n}
    save_file({**tensors, **copies}, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    assert [f.severity for f in said_of(tmp_path)] == ["cosmetic"]
