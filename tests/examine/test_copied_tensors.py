"""A matrix that lies over another one's place is named; models whose layers are copies by design are left in peace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from converter.diagnostic import Diagnostic
from converter.examine.doctor import DoctorRequest, examine
from converter.examine.verify.verify import VerifyRequest
from converter.examine.verify.verify import examine as verify
from healthy.models import Saved
from oracle.bases import read_tensors, write_tensors

FAMILIES = {
    "llama": ("model.layers.{}.mlp.up_proj.weight", "model.layers.{}."),
    "gpt_neox": ("gpt_neox.layers.{}.attention.dense.weight", "gpt_neox.layers.{}."),
    "gpt2": ("transformer.h.{}.attn.c_attn.weight", "transformer.h.{}."),
    "qwen3_moe": ("model.layers.{}.self_attn.q_proj.weight", "model.layers.{}."),
}
CODES = ("copied-tensors", "suspicious-values", "zero-tensors", "nonfinite")


def said_of(folder: Path) -> list[Diagnostic]:
    return [f for f in examine(DoctorRequest(str(folder), deep=True)).findings if f.code in CODES]


def is_verified(folder: Path) -> bool:
    return verify(VerifyRequest(str(folder))).holds


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_matrix_over_that_of_another_layer_is_named(kind: str, tmp_path: Path) -> None:
    folder = Saved("causal", kind).write(tmp_path / "model")
    assert said_of(folder) == []
    assert is_verified(folder)
    tensors, name = read_tensors(folder), FAMILIES[kind][0]
    write_tensors(folder, {**tensors, name.format(1): tensors[name.format(0)].clone()})
    (found,) = said_of(folder)
    assert (found.code, found.severity) == ("copied-tensors", "changes-numbers")
    assert found.tensors == (name.format(0), name.format(1))
    assert not is_verified(folder)


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_layer_that_is_a_copy_of_another_is_a_hint(kind: str, tmp_path: Path) -> None:
    """As in models that were made deeper by copying layers (SOLAR), before they are trained on."""
    folder = Saved("causal", kind).write(tmp_path / "model")
    tensors, layer = read_tensors(folder), FAMILIES[kind][1]
    first = {n: t for n, t in tensors.items() if n.startswith(layer.format(0))}
    copies = {n.replace(layer.format(0), layer.format(1), 1): t.clone() for n, t in first.items()}
    write_tensors(folder, {**tensors, **copies})
    assert {(f.code, f.severity) for f in said_of(folder)} == {("copied-tensors", "cosmetic")}
    assert is_verified(folder)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral"])
def test_keys_that_are_queries_in_every_layer_are_a_hint_and_in_one_layer_are_not(kind: str, tmp_path: Path) -> None:
    folder = Saved("causal", kind).write(tmp_path / "model")
    tensors = read_tensors(folder)
    pairs = [(f"model.layers.{i}.mlp.up_proj.weight", f"model.layers.{i}.mlp.gate_proj.weight") for i in (0, 1)]
    write_tensors(folder, tensors | {b: tensors[a].clone() for a, b in pairs})
    assert {(f.code, f.severity) for f in said_of(folder)} == {("copied-tensors", "cosmetic")}
    write_tensors(folder, tensors | {b: tensors[a].clone() for a, b in pairs[:1]})
    assert {(f.code, f.severity) for f in said_of(folder)} == {("copied-tensors", "changes-numbers")}


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("number", [1e30, -1e12, 1e10])
def test_one_huge_number_is_named_and_not_verified(kind: str, number: float, tmp_path: Path) -> None:
    folder = Saved("causal", kind).write(tmp_path / "model")
    tensors, name = read_tensors(folder), FAMILIES[kind][0].format(1)
    tensors[name].view(-1)[7] = number
    write_tensors(folder, tensors)
    found = [f for f in said_of(folder) if "larger than any weight" in f.text]
    assert [(f.severity, f.tensors) for f in found] == [("changes-numbers", (name,))]
    assert not is_verified(folder)


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_zero_norm_of_one_layer_and_zero_columns_are_named(kind: str, tmp_path: Path) -> None:
    folder = Saved("causal", kind).write(tmp_path / "model")
    tensors, name = read_tensors(folder), FAMILIES[kind][0].format(1)
    norm = next(n for n in tensors if ("norm" in n or ".ln_" in n) and ".1." in n and n.endswith("weight"))
    write_tensors(folder, {**tensors, norm: torch.zeros_like(tensors[norm])})
    assert [f.tensors for f in said_of(folder)] == [(norm,)]
    made = tensors[name].clone()
    made[:, made.shape[1] // 2 :] = 0
    write_tensors(folder, {**tensors, name: made})
    assert [f.tensors for f in said_of(folder)] == [(name,)]
    assert not is_verified(folder)


@pytest.mark.parametrize("kind", ["Pegasus", "Marian"])
def test_tables_of_sines_are_the_same_in_an_encoder_and_its_decoder(kind: str, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {
        "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "vocab_size": 32,
        "max_position_embeddings": 32, "pad_token_id": 0, "decoder_start_token_id": 0,
    }  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(**sizes)
    getattr(transformers, f"{kind}Model")(config).save_pretrained(tmp_path)
    stored = read_tensors(tmp_path)
    assert torch.equal(stored["encoder.embed_positions.weight"], stored["decoder.embed_positions.weight"])
    assert said_of(tmp_path) == []
