"""A field of a type or a word that transformers does not take is found, in families whose shapes are formulas too."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from converter.families import config_types, expected_child
from converter.families.expected import Expected, expected
from oracle.bases import edit_config, read_config
from oracle.command import run

SMALL = {"vocab_size": 24, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20}
MODELS: dict[str, Any] = {
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=8)),
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(**SMALL, num_key_value_heads=2, head_dim=8)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=24, n_embd=16, n_layer=2, n_head=2)),
}
ACTIVATIONS = {"qwen3": "hidden_act", "gemma": "hidden_act", "gpt2": "activation_function"}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0}
HARMS: dict[str, tuple[tuple[str, ...], dict[str, Any], str]] = {
    "an activation that is none": (tuple(MODELS), {"ACTIVATION": "sliu"}, "sliu"),
    "no model type": (tuple(MODELS), {"model_type": ...}, "model_type is not there"),
    "a model type that is none": (tuple(MODELS), {"model_type": "quen"}, "model_type is quen, which transformers"),
    "a kind of layer that is none": (tuple(MODELS), {"layer_types": ["full_attention", "strange"]}, "layer_types"),
    "a text for truth": (tuple(MODELS), {"use_cache": "false"}, "use_cache"),
    "a text for a rate": (("qwen3", "gemma"), {"attention_dropout": "0"}, "attention_dropout"),
    "a rotary embedding that is none": (
        ("qwen3", "gemma"),
        {"rope_parameters": {**YARN, "rope_type": "yarnn"}},
        "yarnn",
    ),
    "a rotary embedding without its factor": (("qwen3", "gemma"), {"rope_parameters": YARN}, "factor"),
}
SOUND: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "another activation": (tuple(MODELS), {"ACTIVATION": "gelu_pytorch_tanh"}),
    "yarn": (("qwen3", "gemma"), {"rope_parameters": {**YARN, "factor": 4.0}}),
    "yarn, as transformers 4 wrote it": (
        ("qwen3", "gemma"),
        {"rope_parameters": ..., "rope_theta": 10000, "rope_scaling": {"type": "yarn", "factor": 4.0}},
    ),
    "sliding layers": (
        ("qwen3",),
        {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 4, "use_sliding_window": True},
    ),
    "a field of nobody's": (tuple(MODELS), {"my_own": {"a": ["b"]}}),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sound")
    for name, make in MODELS.items():
        torch.manual_seed(1)
        make().save_pretrained(root / name)
    return root


def changed(sound: Path, family: str, folder: Path, changes: dict[str, Any]) -> Path:
    shutil.copytree(sound / family, folder)
    edit_config(folder, **{ACTIVATIONS[family] if k == "ACTIVATION" else k: v for k, v in changes.items()})
    return folder


def loads(folder: Path) -> bool:
    """Whether transformers makes a model of a folder."""
    try:
        AutoModelForCausalLM.from_pretrained(folder)(torch.arange(6)[None])
    except Exception:
        return False
    return True


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("harm", "family"), [(h, f) for h, (families, *_) in HARMS.items() for f in families])
def test_what_stops_a_load_is_an_error_and_refused(harm: str, family: str, sound: Path, tmp_path: Path) -> None:
    _, changes, said = HARMS[harm]
    folder = changed(sound, family, tmp_path / "model", changes)
    assert not loads(folder)
    for typed in (("doctor", folder), ("verify", folder), ("reshard", folder, tmp_path / "out")):
        done = run(*typed)
        assert done.code in (1, 3, 4) and said in done.text, (typed, done.text)
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("way", "family"), [(w, f) for w, (families, _) in SOUND.items() for f in families])
def test_what_loads_is_sound_and_transformers_is_not_asked(
    way: str, family: str, sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = changed(sound, family, tmp_path / "model", SOUND[way][1])
    assert loads(folder)
    monkeypatch.setattr(expected_child, "described", lambda *_: pytest.fail("transformers is asked"))
    assert run("doctor", folder).code == 0
    assert run("reshard", folder, tmp_path / "out").code == 0


@pytest.mark.parametrize("family", MODELS)
def test_where_transformers_has_no_answer_the_formulas_stand(
    family: str, sound: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {**read_config(sound / family), "model_type": MODELS[family]().config.model_type, "use_cache": 1}
    assert not config_types.is_plain(config)
    monkeypatch.setattr(expected_child, "described", lambda *_: {"unknown": "it took too long", "passing": True})
    found = expected(config)
    assert isinstance(found, Expected) and found.source.startswith("formulas")
