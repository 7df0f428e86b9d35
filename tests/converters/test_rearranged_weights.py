"""Weights that a load cuts, joins or permutes: an adapter over the modules is merged, in the base's form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from healthy.shrink import build
from oracle.bases import quiet, read_tensors
from oracle.command import merged, run
from oracle.methods import _draw

CASES: dict[str, tuple[str, str, str, list[str], dict[str, Any]]] = {
    "query, key and value in one": ("bare", "nomic_bert", "LoraConfig", ["q_proj", "v_proj", "o_proj"], {}),
    "gate and up in one": ("bare", "gte", "LoraConfig", ["up_proj", "k_proj"], {"use_dora": True}),
    "a method that is not linear": ("bare", "jina_embeddings_v3", "IA3Config", ["q_proj", "v_proj"], {}),
    "biases too": ("bare", "gte", "LoraConfig", ["q_proj"], {"bias": "lora_only"}),
    "one saved whole": ("bare", "gte", "LoraConfig", ["q_proj"], {"modules_to_save": ["v_proj"]}),
    "permuted for rotary embeddings": ("bare", "step3p7", "LoraConfig", ["q_proj", "v_proj", "fc1"], {}),
    "permuted, another method": ("bare", "step3p7", "OFTConfig", ["q_proj"], {"oft_block_size": 4}),
    "two tensors in one module": ("multimodal", "minimax_m3_vl", "LoraConfig", ["gate_up_proj", "q_proj"], {}),
}  # fmt: skip
OFTEN = {"query, key and value in one", "permuted for rotary embeddings", "one saved whole"}


def _made(folder: Path, name: str, dtype: str = "bfloat16") -> tuple[Any, Any]:
    """The base and the adapter in a folder: the base's class, and the model with the adapter."""
    task, kind, method, targets, settings = CASES[name]
    with quiet():
        model = build(task, kind)
        cls = type(model)
        model.to(getattr(torch, dtype)).save_pretrained(folder / "base")
        more = {"feedforward_modules": []} if method == "IA3Config" else {}
        config = getattr(peft, method)(target_modules=targets, **settings, **more)
        wrapped = peft.get_peft_model(cls.from_pretrained(folder / "base", dtype="auto"), config)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter, value in wrapped.named_parameters():
                if value.requires_grad:
                    _draw(parameter, value, generator)
        wrapped.save_pretrained(folder / "adapter")
    return cls, wrapped


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [n if n in OFTEN else pytest.param(n, marks=pytest.mark.slow) for n in CASES])
def test_a_load_of_the_merge_is_pefts_merge_to_the_bit(name: str, tmp_path: Path) -> None:
    cls, _ = _made(tmp_path, name)
    with quiet():
        adapted = peft.PeftModel.from_pretrained(
            cls.from_pretrained(tmp_path / "base", dtype="auto"), tmp_path / "adapter"
        )
        before = {n: t.clone() for n, t in cls.from_pretrained(tmp_path / "base", dtype="auto").state_dict().items()}
        expected = adapted.merge_and_unload().state_dict()
    changed = {n for n, t in expected.items() if not t.equal(before[n])}
    assert all(any(f".{t}." in n for n in changed) for t in CASES[name][3]), "PEFT itself did not merge everything"
    merged(tmp_path / "adapter", tmp_path / "out", "--base", tmp_path / "base", "--numerics", "peft")
    assert {n: t.shape for n, t in read_tensors(tmp_path / "out").items()} == {
        n: t.shape for n, t in read_tensors(tmp_path / "base").items()
    }
    with quiet():
        found, info = cls.from_pretrained(tmp_path / "out", dtype="auto", output_loading_info=True)
    assert not any(info.values())
    differing = [n for n, t in found.state_dict().items() if not t.equal(expected[n])]
    assert sorted(expected) == sorted(found.state_dict()) and not differing


@pytest.mark.filterwarnings("ignore")
def test_what_no_adapter_touches_stays_as_it_lies(tmp_path: Path) -> None:
    _made(tmp_path, "query, key and value in one")
    stored = read_tensors(tmp_path / "base")
    merged(tmp_path / "adapter", tmp_path / "out", "--base", tmp_path / "base")
    found = read_tensors(tmp_path / "out")
    assert list(found) == list(stored)
    width = stored["encoder.layers.0.attn.Wqkv.weight"].shape[1]
    keys = slice(width, 2 * width)
    for name, tensor in stored.items():
        if name.endswith("Wqkv.weight"):
            assert found[name][keys].equal(tensor[keys]) and not found[name][:width].equal(tensor[:width])
        elif "out_proj" not in name:
            assert found[name].equal(tensor)


@pytest.mark.filterwarnings("ignore")
def test_heads_that_the_config_does_not_count_are_not_guessed(tmp_path: Path) -> None:
    _made(tmp_path, "permuted for rotary embeddings")
    path = tmp_path / "base" / "config.json"
    config = json.loads(path.read_text())
    config["vision_config"].pop("num_attention_heads")
    path.write_text(json.dumps(config))
    ran = run("merge-lora", tmp_path / "adapter", tmp_path / "out", "--base", tmp_path / "base")
    assert ran.code == 3 and "REFUSED adapter-fused:" in ran.text
    assert not (tmp_path / "out").exists()
