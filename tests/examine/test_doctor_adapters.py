"""Diagnoses of adapters and of names, on what PEFT and transformers write and on what is made of it by a named
breakage.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from converter.examine.doctor import DoctorRequest, diagnoses, examine
from converter.sources.finding import sources

SIZES = LlamaConfig(
    hidden_size=8,
    intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    vocab_size=16,
    pad_token_id=0,
    num_labels=1,
)


def codes(folder: Path, **asked: Any) -> dict[str, str]:
    return {f.code: f.severity for f in examine(DoctorRequest(str(folder), **asked)).findings}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    LlamaForCausalLM(SIZES).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def adapter_of(base: Path, out: Path, *, task: str | None, targets: Any = ("q_proj", "v_proj"), **more: Any) -> Path:
    """An adapter with values as after training, as PEFT saves it."""
    kind = LlamaForSequenceClassification if task == "SEQ_CLS" or more.pop("reward", False) else LlamaForCausalLM
    model = kind.from_pretrained(base)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=targets if isinstance(targets, str) else list(targets),
                        task_type=task, **more)  # fmt: skip
    wrapped = get_peft_model(model, config)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(crc32(name.encode())))
    wrapped.save_pretrained(out)
    edit(out, base_model_name_or_path=str(base))
    return out


def edit(folder: Path, name: str = "adapter_config.json", **changes: Any) -> None:
    value = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(value | changes))


def rename(file: Path, change: Any) -> None:
    save_file({change(n): t for n, t in load_file(file).items()}, file, metadata=PT)


WEIGHTS = "adapter_model.safetensors"
PT = {"format": "pt"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_CLS", None])
def test_sound_adapters_have_no_finding(base: Path, tmp_path: Path, task: str | None) -> None:
    folder = adapter_of(base, tmp_path / "adapter", task=task)
    assert codes(folder) == {}
    assert {c: s for c, s in codes(folder, deep=True).items() if c != "head-untrained"} == {}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "more",
    [
        {"use_dora": True},
        {"use_rslora": True},
        {"bias": "all"},
        {"rank_pattern": {"q_proj": 4}},
        {"modules_to_save": ["lm_head"]},
        {"targets": ["embed_tokens", "q_proj"]},
        {"targets": "all-linear"},
        {"layers_to_transform": [1]},
    ],
    ids=str,
)
def test_each_kind_of_adapter_that_peft_writes_has_no_finding(base: Path, tmp_path: Path, more: dict[str, Any]) -> None:
    folder = adapter_of(base, tmp_path / "adapter", task="CAUSAL_LM", **more)
    assert {c for c, s in codes(folder, deep=True).items() if s != "cosmetic"} == set()


@pytest.mark.filterwarnings("ignore")
def test_a_head_with_lora_whose_weight_was_never_saved_is_lost(base: Path, tmp_path: Path) -> None:
    folder = adapter_of(base, tmp_path / "adapter", task=None, reward=True, targets=["q_proj", "score"])
    assert codes(folder) == {"head-base-lost": "error"}
    found = next(f for f in examine(DoctorRequest(str(folder))).findings if f.code == "head-base-lost")
    assert found.recoverability == "lost"
    assert found.tensors == ("base_model.model.score.lora_A.weight", "base_model.model.score.lora_B.weight")


@pytest.mark.filterwarnings("ignore")
def test_a_reward_adapter_without_its_head_is_an_error(base: Path, tmp_path: Path) -> None:
    folder = adapter_of(base, tmp_path / "adapter", task="SEQ_CLS")
    tensors = {n: t for n, t in load_file(folder / WEIGHTS).items() if "score" not in n}
    save_file(tensors, folder / WEIGHTS, metadata=PT)
    assert codes(folder) == {"head-missing": "error"}


@pytest.mark.filterwarnings("ignore")
def test_alpha_zero_and_a_lora_b_of_zeros_are_named(base: Path, tmp_path: Path) -> None:
    folder = adapter_of(base, tmp_path / "adapter", task="CAUSAL_LM")
    edit(folder, lora_alpha=0)
    assert "lora-alpha-zero" in codes(folder)
    edit(folder, lora_alpha=4)
    tensors = load_file(folder / WEIGHTS)
    save_file({n: t * 0 if "lora_B" in n else t for n, t in tensors.items()}, folder / WEIGHTS, metadata=PT)
    assert codes(folder) == {"no-op": "error"}
    edit(folder, base_model_name_or_path="nobody/nothing")
    assert codes(folder) == {}
    assert codes(folder, deep=True) == {"no-op": "error"}


@pytest.mark.filterwarnings("ignore")
def test_keys_that_peft_would_ignore_are_an_error_and_peft_ignores_them(base: Path, tmp_path: Path) -> None:
    folder = adapter_of(base, tmp_path / "adapter", task="CAUSAL_LM")
    rename(folder / WEIGHTS, lambda n: f"base_model.model.{n}")
    assert codes(folder) == {"adapter-keys-named": "error"}
    loaded = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), folder)
    assert all(not p.any() for n, p in loaded.named_parameters() if "lora_B" in n)


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_of_another_base_is_an_error_where_the_base_is_at_hand(base: Path, tmp_path: Path) -> None:
    folder = adapter_of(base, tmp_path / "adapter", task="CAUSAL_LM")
    config = LlamaConfig(**{**SIZES.to_dict(), "num_hidden_layers": 1})
    LlamaForCausalLM(config).save_pretrained(tmp_path / "other")
    found = codes(folder, base=str(tmp_path / "other"))
    assert found["adapter-unmatched"] == "error"
    assert found["base-differs"] == "cosmetic"


@pytest.mark.filterwarnings("ignore")
def test_layers_that_the_adapter_should_cover_and_does_not_are_an_error(base: Path, tmp_path: Path) -> None:
    folder = adapter_of(base, tmp_path / "adapter", task="CAUSAL_LM")
    save_file(
        {n: t for n, t in load_file(folder / WEIGHTS).items() if "layers.1." not in n}, folder / WEIGHTS, metadata=PT
    )
    assert codes(folder) == {"adapter-targets-missing": "error"}


@pytest.mark.filterwarnings("ignore")
def test_half_of_a_module_is_an_error(base: Path, tmp_path: Path) -> None:
    folder = adapter_of(base, tmp_path / "adapter", task="CAUSAL_LM")
    save_file({n: t for n, t in load_file(folder / WEIGHTS).items() if "layers.1" not in n or "lora_B" not in n},
              folder / WEIGHTS, metadata=PT)  # fmt: skip
    assert codes(folder)["adapter-half"] == "error"


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda n: f"_orig_mod.{n}", "names-wrapped"),
        (lambda n: f"module.{n}", "names-wrapped"),
        (lambda n: n.replace("layers.0.", "layers.0._checkpoint_wrapped_module."), "names-wrapped"),
        (lambda n: n.replace("q_proj.weight", "q_proj.base_layer.weight"), "lora-unmerged"),
        (lambda n: f"rwtranrsformer.{n}", "names-of-a-trainer"),
        (lambda n: f"policy.{n}", "names-of-a-trainer"),
        (lambda n: f"base_model.{n}".replace("base_model.model.", "model.model."), "names-doubled"),
    ],
)
def test_names_that_no_loader_looks_for_are_errors(base: Path, change: Any, code: str) -> None:
    assert codes(base) == {}
    rename(base / "model.safetensors", change)
    assert codes(base)[code] == "error"


def test_flat_parameters_are_lost(base: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    save_file(
        {**tensors, "model._fsdp_wrapped_module._flat_param": torch.ones(5)}, base / "model.safetensors", metadata=PT
    )
    found = {f.code: f.recoverability for f in examine(DoctorRequest(str(base))).findings}
    assert found["fsdp-flat"] == "lost"


def test_every_diagnosis_explains_itself_and_every_command_is_one_that_exists() -> None:
    from converter.cli import VERBS

    assert len(diagnoses()) > 60
    for code, each in diagnoses().items():
        assert code == each.code
        assert len(each.doc) > 30, code
    assert "doctor" in VERBS
    assert sources()
