"""A verb that writes looks at values as they pass by: a matrix or a norm that is zero everywhere is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForSequenceClassification,
)

import oracle
from converter.cli import main
from converter.core.compute.finite import ValuesSeen
from converter.core.tensors.dtypes import DType
from converter.families.never_zero import norms_that_differ
from oracle.command import listing, run

SMALL = {"vocab_size": 24, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20}
MODELS: dict[str, Any] = {
    "llama": lambda: LlamaForSequenceClassification(LlamaConfig(**SMALL, num_labels=1)),
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(**SMALL, num_key_value_heads=2, head_dim=8)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=24, n_embd=16, n_layer=2, n_head=2)),
}
MATRICES = {
    "llama": "model.layers.1.mlp.up_proj.weight", "gemma": "model.layers.0.self_attn.o_proj.weight",
    "gpt2": "transformer.h.1.mlp.c_fc.weight",
}  # fmt: skip
NORMS = {"llama": "model.layers.1.input_layernorm.weight", "gpt2": "transformer.h.0.ln_1.weight"}


def saved(folder: Path, family: str, zero: str = "", dtype: torch.dtype = torch.float32) -> Path:
    torch.manual_seed(1)
    MODELS[family]().to(dtype).save_pretrained(folder)
    if zero:
        file = folder / "model.safetensors"
        tensors = load_file(file)
        tensors[zero] = -torch.zeros_like(tensors[zero])  # a zero with a sign is one
        save_file(tensors, file, {"format": "pt"})
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("family", "name"), [*MATRICES.items(), *NORMS.items()])
@pytest.mark.parametrize(
    "more", [(), ("--dtype", "bf16"), ("--max-shard-size", "1KB")], ids=["copied", "cast", "sharded"]
)
def test_what_is_zero_is_named_before_anything_is_published(
    family: str, name: str, dtype: torch.dtype, more: tuple[str, ...], tmp_path: Path
) -> None:
    source = saved(tmp_path / "model", family, name, dtype)
    before = listing(tmp_path)
    done = run("reshard", source, tmp_path / "out", *more)
    assert (done.code, "REFUSED zero-tensors" in done.err, name in done.err) == (3, True, True), done.err
    assert f"rlhf-convert doctor {source} --deep" in done.err
    assert listing(tmp_path) == before
    assert "zero-tensors" in run("doctor", source, "--deep").out
    allowed = run("reshard", source, tmp_path / "out", *more, "--allow", "zero-tensors")
    assert allowed.code == 0, allowed.err
    receipt = json.loads((tmp_path / "out" / "rlhf-convert.json").read_text())
    assert receipt["tensors"][name]["zeros"] == load_file(source / "model.safetensors")[name].numel()


@pytest.mark.parametrize("family", MODELS)
def test_what_is_zero_by_design_is_not(family: str, tmp_path: Path) -> None:
    """Biases and Gemma's norms begin at zero, and so do heads that were asked for."""
    source = saved(tmp_path / "model", family)
    zero = [n for n, t in load_file(source / "model.safetensors").items() if not t.any()]
    assert bool(zero) == (family != "llama")
    assert main(["reshard", str(source), str(tmp_path / "out"), "-q"]) == 0
    if family == "gpt2":
        line = [
            "convert",
            str(source),
            str(tmp_path / "critic"),
            "--to",
            "trl",
            "--role",
            "reward",
            "--init-head",
            "zeros",
        ]
        assert main([*line, "-q"]) == 0


@pytest.mark.parametrize("verb", ["merge-lora", "average"])
def test_other_verbs_look_too(verb: str, tmp_path: Path) -> None:
    base = oracle.make_base(tmp_path / "base")
    name = "model.layers.0.mlp.down_proj.weight"
    file = base.path / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, name: torch.zeros_like(tensors[name])}, file, {"format": "pt"})
    adapter = oracle.make_adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    words = {
        "merge-lora": (adapter, tmp_path / "out", "--base", base.path),
        "average": (base.path, base.path, tmp_path / "out"),
    }
    done = run(verb, *words[verb])
    assert (done.code, "zero-tensors" in done.err) == (3, True), done.err
    assert not (tmp_path / "out").exists()
    if verb == "merge-lora":  # an update makes it what it was trained to be
        adapted = oracle.make_adapter(tmp_path / "other", base, target_modules=["down_proj"])
        assert run(verb, adapted, tmp_path / "out", "--base", base.path).code == 0


def test_norms_of_one_kind_are_compared_with_each_other() -> None:
    kinds = [f"model.layers.{n}.input_layernorm.weight" for n in range(3)]
    assert norms_that_differ(dict.fromkeys([*kinds, "model.norm.weight"], True)) == []
    assert norms_that_differ({**dict.fromkeys(kinds, False), kinds[1]: True}) == [kinds[1]]
    assert norms_that_differ({**dict.fromkeys(kinds, False), "model.norm.weight": True}) == ["model.norm.weight"]
    gated = {f"model.layers.{n}.linear_attn.norm.weight": False for n in range(3)}
    assert norms_that_differ({**gated, **dict.fromkeys([*kinds, "model.norm.weight"], True)}) == []


@pytest.mark.parametrize("dtype", [DType.BF16, DType.F16, DType.F32, DType.F64, DType.F8_E4M3])
def test_a_zero_is_told_from_the_least_value_in_blocks_that_cut_it(dtype: DType) -> None:
    size = dtype.bits // 8
    for raw, zeros in (
        (bytes(6 * size), 6),
        (bytes(5 * size) + bytes(size - 1) + b"\x80", 6),
        (bytes(5 * size) + b"\x01" + bytes(size - 1), 0),
        (bytes(3 * size) + (b"\x01" + bytes(size - 2) + b"\x80" if size > 1 else b"\x81") + bytes(2 * size), 0),
    ):
        for cut in range(1, len(raw)):
            seen = ValuesSeen(dtype)
            seen.add(memoryview(raw)[:cut])
            seen.add(memoryview(raw)[cut:])
            assert seen.zeros == zeros, (raw, cut)
