"""`repair --for transformers@4` writes the old keys beside the new ones, and refuses where it knows none.

That transformers 4 computes the same with them is shown by `trainers/test_transformers_4.py`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from converter.cli import main
from converter.examine.doctor import DoctorRequest, examine
from hub_here import run
from rope_models import load, save

ADDED: dict[str, dict[str, Any]] = {
    "llama": {"rope_theta": 500000.0},
    "linear": {"rope_theta": 20000.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "gpt_neox": {"rotary_emb_base": 500000.0, "rotary_pct": 0.5},
    "phi3": {"rope_theta": 500000.0, "partial_rotary_factor": 0.5},
    "qwen3_moe": {"rope_theta": 500000.0, "num_experts": 4},
    "gemma3": {
        "rope_theta": 300000.0,
        "rope_local_base_freq": 20000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    "modernbert": {"global_rope_theta": 300000.0, "local_rope_theta": 20000.0, "global_attn_every_n_layers": 2},
}


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def fixed(folder: Path) -> Path:
    out = folder.parent / "out"
    assert main(["repair", str(folder), str(out), "--for", "transformers@4", "-q"]) == 0
    return out


@pytest.mark.parametrize("name", ADDED)
def test_old_keys_stand_beside_the_new_ones(name: str, tmp_path: Path) -> None:
    expected = save(name, tmp_path / "model")
    out = fixed(tmp_path / "model")
    before = config_of(tmp_path / "model")
    assert config_of(out) == before | ADDED[name] | {"torch_dtype": "float32"}
    assert torch.equal(load(name, out), expected)  # transformers 5 reads both, and computes what it did


def test_the_config_of_a_text_model_inside_another_gets_them_too(tmp_path: Path) -> None:
    expected = save("qwen2_vl", tmp_path / "model")
    out = fixed(tmp_path / "model")
    text = config_of(out)["text_config"]
    assert text["rope_theta"] == 500000.0
    assert text["rope_scaling"] == {"rope_type": "default", "mrope_section": [1, 1, 2], "type": "mrope"}
    assert torch.equal(load("qwen2_vl", out), expected)


ROPE_BY_LAYER = {"full_attention": {"rope_theta": 1.0}, "sliding_attention": {"rope_theta": 2.0}}
UNEVEN = ["full_attention", "sliding_attention", "full_attention", "full_attention"]


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama", {"rope_parameters": ROPE_BY_LAYER}),
        ("olmo3", {"rope_parameters": ROPE_BY_LAYER}),
        ("modernbert", {"layer_types": UNEVEN}),
    ],
)
def test_what_transformers_4_has_no_spelling_for_is_refused(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    save(name, tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps(config_of(tmp_path / "model") | changes))
    refused = run("repair", tmp_path / "model", tmp_path / "out", "--for", "transformers@4")
    assert (refused.returncode, "spelling-unknown" in refused.stderr) == (3, True)
    assert not (tmp_path / "out").exists()


def test_keys_that_a_config_has_are_never_changed(tmp_path: Path) -> None:
    save("llama", tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps(config_of(tmp_path / "model") | {"rope_theta": 7.0}))
    findings = examine(DoctorRequest(str(tmp_path / "model"), target="transformers@4")).findings
    assert "rope-of-transformers-5" not in [f.code for f in findings]


def test_a_theta_that_is_the_default_of_transformers_4_is_no_finding(tmp_path: Path) -> None:
    save("llama", tmp_path / "model")
    config = config_of(tmp_path / "model")
    config["rope_parameters"]["rope_theta"] = 10000.0
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    assert examine(DoctorRequest(str(tmp_path / "model"), target="transformers@4")).findings == ()


TEMPLATES = {
    "nothing": ([], {"add_bos_token": False, "add_eos_token": False}),
    "both": (["<s>", "</s>"], {"add_bos_token": True, "add_eos_token": True}),
}


@pytest.mark.parametrize("added", TEMPLATES)
def test_a_tokenizer_adds_in_transformers_4_what_its_own_template_adds(added: str, tmp_path: Path) -> None:
    """In transformers 4 a LlamaTokenizer puts <s> first unless its config says no."""
    around, expected = TEMPLATES[added]
    special, text = [{"SpecialToken": {"id": t, "type_id": 0}} for t in around], {"Sequence": {"id": "A", "type_id": 0}}
    template = {"type": "TemplateProcessing", "single": [*special[:1], text, *special[1:]]}
    save("llama", tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text(json.dumps({"post_processor": template}))
    config = {"backend": "tokenizers", "tokenizer_class": "LlamaTokenizer", "extra_special_tokens": ["<a>"]}
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps(config))
    told = json.loads((fixed(tmp_path / "model") / "tokenizer_config.json").read_text())
    old = {"backend": "tokenizers", "tokenizer_class": "LlamaTokenizer", "additional_special_tokens": ["<a>"]}
    assert told == old | expected
