"""Embeddings under the names of their family: what is judged by them does not stop at Llama's names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

from converter.examine.doctor import DoctorRequest, examine
from oracle.command import run

SIZE = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 24}
MODELS = {
    "llama": (
        lambda: LlamaForCausalLM(LlamaConfig(**SIZE, vocab_size=40)), "model.embed_tokens.weight", "lm_head.weight",
    ),
    "gpt_neox": (
        lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZE, vocab_size=40)),
        "gpt_neox.embed_in.weight", "embed_out.weight",
    ),
    "gpt2": (
        lambda: GPT2LMHeadModel(GPT2Config(n_embd=16, n_head=2, n_layer=1, vocab_size=40)),
        "transformer.wte.weight", "lm_head.weight",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("equal", [True, False])
def test_doctor_compares_the_two_copies_of_a_tied_embedding(kind: str, equal: bool, tmp_path: Path) -> None:
    make, embedding, head = MODELS[kind]
    torch.manual_seed(0)
    make().save_pretrained(tmp_path / "m")
    file, config = tmp_path / "m" / "model.safetensors", tmp_path / "m" / "config.json"
    tensors = load_file(file)
    tensors[head] = tensors[embedding].clone() + (0 if equal else 1)
    save_file(tensors, file, metadata={"format": "pt"})
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tie_word_embeddings": True}))
    found = examine(DoctorRequest(str(tmp_path / "m"), deep=True)).findings
    severities = [f.severity for f in found if f.code == "tied-copies"]
    assert severities == ["cosmetic" if equal else "changes-numbers"]


@pytest.mark.parametrize("rows", [33, 40])
def test_verify_knows_that_deepspeed_chat_resizes_embeddings_before_it_reads_them(rows: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZE, vocab_size=rows))
    state = {f"rwtransformer.{n}": t for n, t in model.model.state_dict().items()} | {
        "v_head.weight": torch.randn(1, 16)
    }
    model.config.save_pretrained(tmp_path)
    torch.save(state, tmp_path / "pytorch_model.bin")
    ran = run("verify", tmp_path, "--for", "deepspeed-chat", "--role", "critic", "--json")
    failing = {c["code"] for c in json.loads(ran.out)["checks"] if c["outcome"] == "fails"}
    assert ("vocabulary" in failing) == (rows == 33)
