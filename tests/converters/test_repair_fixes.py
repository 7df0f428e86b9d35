"""`repair` of folders that lack nothing: names, indexes, ties, labels; what it writes loads, and says what it left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from converter.cli import main
from converter.examine.doctor import DoctorRequest, examine

SIZES = {
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 16,
}
FILE = "model.safetensors"


@pytest.fixture
def causal(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(tmp_path / "lm")
    return tmp_path / "lm"


@pytest.fixture
def reward(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    LlamaForSequenceClassification(LlamaConfig(**SIZES, num_labels=1, pad_token_id=0)).save_pretrained(tmp_path / "rm")
    return tmp_path / "rm"


def edit(folder: Path, name: str = "config.json", drop: tuple[str, ...] = (), **changes: Any) -> None:
    value = json.loads((folder / name).read_text()) | changes
    (folder / name).write_text(json.dumps({k: v for k, v in value.items() if k not in drop}))


def rename(folder: Path, change: Any, file: str = FILE) -> None:
    save_file({change(n): t for n, t in load_file(folder / file).items()}, folder / file, metadata={"format": "pt"})


def repaired(folder: Path, *more: str) -> Path:
    out = folder.parent / "out"
    assert main(["repair", str(folder), str(out), "-q", *more]) == 0
    assert [f.code for f in examine(DoctorRequest(str(out), deep=True)).findings if f.severity != "cosmetic"] == []
    return out


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize(
    "change",
    [
        lambda n: f"_orig_mod.{n}",
        lambda n: f"module._orig_mod.{n}",
        lambda n: n.replace("layers.0.", "layers.0._checkpoint_wrapped_module._fsdp_wrapped_module."),
    ],
)
def test_wrappers_are_taken_off_and_the_model_loads_as_it_was(causal: Path, change: Any) -> None:
    before = load_file(causal / FILE)
    rename(causal, change)
    out = repaired(causal)
    assert same(load_file(out / FILE), before)
    loaded, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert torch.equal(loaded.lm_head.weight, before["lm_head.weight"])


def test_the_recipe_of_a_repair_that_fills_nothing_runs_and_writes_the_same(
    causal: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rename(causal, lambda n: f"_orig_mod.{n}")
    out = repaired(causal)
    capsys.readouterr()
    assert main(["repair", str(causal), str(tmp_path / "again"), "--print-recipe"]) == 0
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(capsys.readouterr().out)
    assert main(["run", str(recipe), str(tmp_path / "again"), "-q"]) == 0
    for file in sorted(out.iterdir()):
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()


def test_two_names_that_become_one_are_refused(causal: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = load_file(causal / FILE)
    save_file(tensors | {"_orig_mod.model.norm.weight": torch.zeros(8)}, causal / FILE)
    assert main(["repair", str(causal), str(causal.parent / "out")]) == 3
    assert "rename-collision" in capsys.readouterr().err
    assert not (causal.parent / "out").exists()


def test_labels_follow_the_head(reward: Path) -> None:
    edit(reward, drop=("id2label", "label2id", "num_labels"))
    with pytest.raises(RuntimeError):
        AutoModelForSequenceClassification.from_pretrained(reward)
    out = repaired(reward)
    loaded = AutoModelForSequenceClassification.from_pretrained(out)
    assert torch.equal(loaded.score.weight, load_file(reward / FILE)["score.weight"])


def test_a_wrapper_s_class_becomes_the_class_within(causal: Path) -> None:
    edit(causal, architectures=["FSDPLlamaForCausalLM"])
    assert json.loads((repaired(causal) / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


def test_an_index_is_made_anew_and_metadata_says_pt(causal: Path) -> None:
    LlamaForCausalLM.from_pretrained(causal).save_pretrained(causal.parent / "parts", max_shard_size="2KB")
    parts = causal.parent / "parts"
    index = json.loads((parts / "model.safetensors.index.json").read_text())
    index["metadata"]["total_size"] = 3
    del index["weight_map"]["model.norm.weight"]
    (parts / "model.safetensors.index.json").write_text(json.dumps(index))
    out = repaired(parts)
    made = json.loads((out / "model.safetensors.index.json").read_text())
    assert made["metadata"]["total_size"] == sum(t.nbytes for t in load_file(causal / FILE).values())
    assert set(made["weight_map"]) == set(load_file(causal / FILE))
    with safe_open(next(out.glob("*.safetensors")), "pt") as file:
        assert file.metadata()["format"] == "pt"


def test_equal_tied_copies_are_stored_once_and_different_ones_are_untied_with_consent(
    causal: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(causal, tie_word_embeddings=True)
    assert main(["repair", str(causal), str(causal.parent / "out")]) == 3
    assert "--allow untie" in capsys.readouterr().err
    out = repaired(causal, "--allow", "untie")
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(loaded.lm_head.weight, load_file(causal / FILE)["lm_head.weight"])
    tensors = load_file(causal / FILE)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, causal / FILE)
    assert main(["repair", str(causal), str(causal.parent / "once"), "-q"]) == 0
    assert "lm_head.weight" not in load_file(causal.parent / "once" / FILE)


def test_rows_that_are_not_the_vocabulary_need_consent_and_then_the_config_follows(
    causal: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(causal, vocab_size=15)
    assert main(["repair", str(causal), str(causal.parent / "out")]) == 3
    assert "--allow vocabulary-rows" in capsys.readouterr().err
    assert not (causal.parent / "out").exists()
    assert AutoModelForCausalLM.from_pretrained(repaired(causal, "--allow", "vocabulary-rows")).config.vocab_size == 16


def test_both_spellings_stand_in_a_config_for_transformers_4(causal: Path) -> None:
    edit(causal, rope_parameters={"rope_type": "default", "rope_theta": 500000.0}, drop=("rope_theta",))
    config = json.loads((repaired(causal, "--for", "transformers@4") / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 500000.0
    assert config["torch_dtype"] == config["dtype"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "change",
    [
        lambda n: f"base_model.model.{n}",
        lambda n: f"module.{n}",
        lambda n: n.replace(".weight", ".default.weight"),
        lambda n: n.removeprefix("base_model.model."),
    ],
)
def test_an_adapter_s_keys_become_those_that_peft_looks_for(causal: Path, change: Any) -> None:
    folder = causal.parent / "adapter"
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(causal), LoraConfig(r=2, target_modules=["q_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    edit(folder, "adapter_config.json", base_model_name_or_path=str(causal))
    before = load_file(folder / "adapter_model.safetensors")
    rename(folder, change, "adapter_model.safetensors")
    out = repaired(folder)
    assert same(load_file(out / "adapter_model.safetensors"), before)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(causal), out)
    assert all(p.any() for n, p in loaded.named_parameters() if "lora_B" in n)


@pytest.mark.filterwarnings("ignore")
def test_lora_layers_left_in_a_full_model_are_merged_with_the_alpha_that_is_given(
    causal: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(causal), LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "v_proj"])
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    state = {n.removeprefix("base_model.model."): t.contiguous() for n, t in model.state_dict().items()}
    broken = causal.parent / "broken"
    broken.mkdir()
    (broken / "config.json").write_bytes((causal / "config.json").read_bytes())
    save_file(state, broken / FILE, metadata={"format": "pt"})
    assert main(["repair", str(broken), str(causal.parent / "out")]) == 3
    assert "--lora-alpha" in capsys.readouterr().err
    out = repaired(broken, "--lora-alpha", "6")
    expected = model.merge_and_unload().state_dict()
    made = load_file(out / FILE)
    assert made.keys() == expected.keys()
    assert all(torch.allclose(made[n], expected[n], atol=1e-6) for n in made)


@pytest.mark.filterwarnings("ignore")
def test_what_no_fix_reaches_is_refused_with_the_step_that_does_and_nothing_is_written(
    causal: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(causal, quantization_config={"quant_method": "gptq"}, architectures=["FSDPLlamaForCausalLM"])
    assert main(["repair", str(causal), str(causal.parent / "out")]) == 3
    said = capsys.readouterr().err
    assert "quantisation-left" in said
    assert "take quantization_config out" in said
    assert not (causal.parent / "out").exists()


def test_a_sound_folder_is_called_so(causal: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["repair", str(causal), str(causal.parent / "out"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["healthy"] is True
    assert not (causal.parent / "out").exists()
