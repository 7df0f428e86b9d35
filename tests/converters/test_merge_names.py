"""Adapter keys in every spelling that trainers leave: the merge is that of the plain spelling, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import oracle
from oracle.bases import without_prefix
from oracle.command import merged

PLAIN = "base_model.model."


def _adapter_name(name: str) -> Callable[[str], str]:
    """What PEFT's own state dict holds before it takes the adapter's name out."""

    def rename(key: str) -> str:
        for marker in (".lora_A", ".lora_B", ".lora_magnitude_vector", ".lora_embedding_A", ".lora_embedding_B"):
            if marker in key:
                return key.replace(marker, f"{marker}.{name}")
        return key

    return rename


SPELLINGS: dict[str, Callable[[str], str]] = {
    "twice": lambda k: PLAIN + k,
    "missing": lambda k: k.removeprefix(PLAIN),
    "ddp": lambda k: "module." + k,
    "compiled": lambda k: "_orig_mod." + k,
    "compiled-inside": lambda k: k.replace(PLAIN, PLAIN + "_orig_mod."),
    "fsdp": lambda k: "_fsdp_wrapped_module." + k,
    "fsdp-layers": lambda k: k.replace("layers.0.", "layers.0._fsdp_wrapped_module.").replace(
        "layers.1.", "layers.1._fsdp_wrapped_module."
    ),
    "ddp-of-compiled": lambda k: "module._orig_mod." + k,
    "missing-and-ddp": lambda k: "module." + k.removeprefix(PLAIN),
    "default": _adapter_name("default"),
    "reward": _adapter_name("reward"),
    "default-and-ddp": lambda k: "module." + _adapter_name("default")(k),
    "fsdp-and-default": lambda k: "_fsdp_wrapped_module." + _adapter_name("default")(k),
    "magnitude-as-a-module": lambda k: k.replace(".lora_magnitude_vector", ".lora_magnitude_vector.weight"),
    "magnitude-named": lambda k: _adapter_name("default")(k).replace("vector.default", "vector.default.weight"),
    "twice-and-default": lambda k: PLAIN + _adapter_name("default")(k),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spelling_of_the_keys_does_not_change_the_merge(spelling: str, tmp_path: Path) -> None:
    base = oracle.make_base(tmp_path / "base")
    adapter = oracle.make_adapter(tmp_path / "adapter", base, use_dora=True)
    expected = oracle.peft_merge(base, adapter)
    other = oracle.rewrite_adapter(adapter, tmp_path / "other", rename=SPELLINGS[spelling])
    merged(other, tmp_path / "out", "--base", base.path, "--numerics", "peft")
    oracle.same_bits(oracle.read_tensors(tmp_path / "out"), expected)


@pytest.mark.parametrize("spelling", ["missing", "default", "fsdp", "twice"])
def test_spelling_of_the_keys_does_not_change_embeddings_heads_and_biases(spelling: str, tmp_path: Path) -> None:
    base = oracle.make_base(tmp_path / "base", "qwen2")
    adapter = oracle.make_adapter(
        tmp_path / "adapter",
        base,
        target_modules=["embed_tokens", "q_proj", "v_proj"],
        modules_to_save=["lm_head"],
        bias="all",
    )
    expected = oracle.peft_merge(base, adapter)
    other = oracle.rewrite_adapter(adapter, tmp_path / "other", rename=SPELLINGS[spelling])
    merged(other, tmp_path / "out", "--base", base.path, "--numerics", "peft")
    oracle.same_bits(oracle.read_tensors(tmp_path / "out"), expected)


def test_modules_to_save_in_an_old_pefts_spelling_are_found(tmp_path: Path) -> None:
    """Before 0.4 the wrapper stayed in the key: `lm_head.modules_to_save.default.weight`."""
    base = oracle.make_base(tmp_path / "base")
    adapter = oracle.make_adapter(tmp_path / "adapter", base, modules_to_save=["lm_head"])
    expected = oracle.peft_merge(base, adapter)
    other = oracle.rewrite_adapter(
        adapter,
        tmp_path / "other",
        rename=lambda k: k.replace("lm_head.weight", "lm_head.modules_to_save.default.weight"),
    )
    merged(other, tmp_path / "out", "--base", base.path, "--numerics", "peft")
    oracle.same_bits(oracle.read_tensors(tmp_path / "out"), expected)


def test_adapter_of_the_backbone_alone_fits_the_model_with_a_head(tmp_path: Path) -> None:
    base = oracle.make_base(tmp_path / "base")
    adapter = oracle.make_adapter(tmp_path / "adapter", base)
    expected = oracle.peft_merge(base, adapter)
    other = oracle.rewrite_adapter(
        adapter, tmp_path / "other", rename=lambda k: k.replace(PLAIN + "model.layers", PLAIN + "layers")
    )
    merged(other, tmp_path / "out", "--base", base.path, "--numerics", "peft")
    oracle.same_bits(oracle.read_tensors(tmp_path / "out"), expected)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_adapter_under_the_names_on_disk_fits_as_well_as_under_those_in_memory(family: str, tmp_path: Path) -> None:
    """GPT-NeoX's head is `embed_out` on disk and in adapters of transformers 4, `lm_head` in memory since 5."""
    base = oracle.make_base(tmp_path / "base", family)
    settings = {"gpt_neox": ["lm_head", "dense"], "gpt2": ["c_attn"]}
    adapter = oracle.make_adapter(tmp_path / "adapter", base, target_modules=settings[family])
    expected = oracle.peft_merge(base, adapter)
    if family == "gpt_neox":
        other = oracle.rewrite_adapter(adapter, tmp_path / "other", rename=lambda k: k.replace("lm_head", "embed_out"))
        merged(other, tmp_path / "out", "--base", base.path, "--numerics", "peft")
    else:
        plain = without_prefix(base, tmp_path / "plain")
        other = oracle.rewrite_adapter(adapter, tmp_path / "other", rename=lambda k: k.replace("transformer.h", "h"))
        merged(other, tmp_path / "out", "--base", plain.path, "--numerics", "peft")
        masks = {k: v for k, v in oracle.read_tensors(plain.path).items() if k.endswith(".attn.bias")}
        expected = {k.removeprefix("transformer."): v for k, v in expected.items()} | masks
    oracle.same_bits(oracle.read_tensors(tmp_path / "out"), expected)


def test_the_rule_that_was_used_is_printed(tmp_path: Path) -> None:
    base = oracle.make_base(tmp_path / "base")
    adapter = oracle.make_adapter(tmp_path / "adapter", base)
    other = oracle.rewrite_adapter(adapter, tmp_path / "other", rename=SPELLINGS["fsdp"])
    assert "_fsdp_wrapped_module" in merged(other, tmp_path / "out", "--base", base.path).text
