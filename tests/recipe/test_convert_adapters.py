"""`convert` of more than one folder: reward adapters over their base, runs of DeepSpeed, what lost tensors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import heads_zoo as zoo
from heads_run import base_of, done, refused
from oracle.command import listing
from repair.live import copied
from repair.live import live as repaired_live
from zero.compare import RUNS
from zero.compare import live as zero_live

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft's call
SEQCLS = zoo.FORMS["hf-seqcls"]
PREFIX = "base_model.model."


def adapter(folder: Path, base: Path, auto: Any = transformers.AutoModelForSequenceClassification, **lora: Any) -> Path:
    """An adapter that PEFT saved, its B drawn."""
    labels = {} if auto is transformers.AutoModelForCausalLM else {"num_labels": 1}
    torch.manual_seed(1)
    model = auto.from_pretrained(base, **labels)
    made = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, **lora))
    made.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_of(zoo.live("llama"), tmp_path_factory.mktemp("base") / "base")


@pytest.mark.parametrize("lora", [{"task_type": "SEQ_CLS"}, {"modules_to_save": ["score"]}], ids=["seq-cls", "no-task"])
def test_a_reward_adapter_is_merged_with_its_saved_head_in_the_same_pass(
    lora: dict[str, Any], base: Path, tmp_path: Path
) -> None:
    made = adapter(tmp_path / "adapter", base, target_modules=["q_proj", "v_proj"], **lora)
    done("rm-to-critic", made, tmp_path / "critic", "--to", "verl", "--base", base)
    found = load_file(tmp_path / "critic" / "model.safetensors")
    saved = load_file(made / "adapter_model.safetensors")
    assert torch.equal(found["score.weight"], saved[f"{PREFIX}score.weight"])
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
    expected = peft.PeftModel.from_pretrained(model, made).merge_and_unload().state_dict()
    name = "model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(found[name], expected[name].bfloat16())


@pytest.mark.parametrize("file", ["value_head.safetensors", "value_head.bin", "pytorch_model.bin"])
def test_a_head_in_a_file_beside_an_adapter_is_found(file: str, base: Path, tmp_path: Path) -> None:
    """LLaMA-Factory and TRL keep it there."""
    causal = transformers.AutoModelForCausalLM
    made = adapter(tmp_path / "adapter", base, causal, task_type="CAUSAL_LM", target_modules=["q_proj"])
    head = {"v_head.summary.weight": torch.randn(1, zoo.HIDDEN), "v_head.summary.bias": torch.randn(1)}
    (torch.save if file.endswith(".bin") else save_file)(head, made / file)
    done("rm-to-critic", made, tmp_path / "critic", "--to", "verl", "--base", base)
    found = load_file(tmp_path / "critic" / "model.safetensors")
    assert torch.equal(found["score.weight"], head["v_head.summary.weight"])
    assert torch.equal(found["score.bias"], head["v_head.summary.bias"])


def test_lora_on_a_head_that_was_never_saved_is_refused_with_what_would_bring_it_back(
    base: Path, tmp_path: Path
) -> None:
    made = adapter(tmp_path / "adapter", base, target_modules="all-linear")  # as OpenRLHF: no task_type
    assert f"{PREFIX}score.lora_A.weight" in load_file(made / "adapter_model.safetensors")
    before = listing(tmp_path)
    ran = refused("head-base-lost", "rm-to-critic", made, tmp_path / "critic", "--to", "openrlhf", "--base", base)
    assert "frozen_param_fragments" in ran.text
    assert "beside and above it: no shards of a trainer" in ran.text
    assert "--init-head zeros" in ran.text
    assert listing(tmp_path) == before
    fresh = done("rm-to-critic", made, tmp_path / "critic", "--to", "openrlhf", "--base", base, "--init-head", "zeros")
    assert "changes-numbers (init-head)" in fresh.text
    assert not load_file(tmp_path / "critic" / "model.safetensors")["score.weight"].any()
    consents = json.loads((tmp_path / "critic" / "rlhf-convert.json").read_text())["consents"]
    assert "learnt nothing" in consents["init-head"]


def test_an_empty_safetensors_beside_a_whole_bin_is_passed_over(base: Path, tmp_path: Path) -> None:
    """OpenRLHF up to 0.5.5 wrote both."""
    made = adapter(tmp_path / "adapter", base, target_modules=["q_proj"], modules_to_save=["score"])
    held = load_file(made / "adapter_model.safetensors")
    torch.save(held, made / "adapter_model.bin")
    save_file({n: torch.empty(0) for n in held}, made / "adapter_model.safetensors")
    done("rm-to-critic", made, tmp_path / "critic", "--to", "openrlhf", "--base", base)
    found = load_file(tmp_path / "critic" / "model.safetensors")
    assert torch.equal(found["score.weight"], held[f"{PREFIX}score.weight"])


def test_an_adapter_without_any_head_is_refused(base: Path, tmp_path: Path) -> None:
    made = adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    refused("head-missing", "rm-to-critic", made, tmp_path / "critic", "--to", "openrlhf", "--base", base)


def test_a_deepspeed_run_with_a_frozen_head_under_lora_becomes_a_critic_in_one_pass(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(RUNS / "lora-frozen-head-z3-n2", tmp_path / "run"))
    (folder / "config-of-run.json").rename(folder / "config.json")
    done("rm-to-critic", folder, tmp_path / "critic", "--to", "openrlhf@0.5.2")
    held = zero_live(folder)
    low, high = (held[f"{PREFIX}score.lora_{x}.default.weight"].float() for x in "AB")
    frozen = held[f"{PREFIX}score.base_layer.weight"]
    expected = (frozen.float() + 4.0 * (high @ low)).to(frozen.dtype)
    assert torch.equal(load_file(tmp_path / "critic" / "model.safetensors")["value_head.weight"], expected)


def test_empty_tensors_and_a_lost_head_are_filled_from_the_run_s_shards_on_the_way(tmp_path: Path) -> None:
    folder = copied(tmp_path, "head")
    held = repaired_live("head")
    frozen = {n.removeprefix(PREFIX).replace(".base_layer", ""): t for n, t in held.items() if ".lora_" not in n}
    head = frozen.pop("score.weight")
    base = tmp_path / "base"
    base.mkdir()
    save_file({n: t.contiguous() for n, t in frozen.items()}, base / "model.safetensors", metadata={"format": "pt"})
    shape = {
        "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 11,
        "num_key_value_heads": 1, "pad_token_id": 0,
    }  # fmt: skip
    config = shape | {"model_type": "llama", "architectures": ["LlamaModel"], "tie_word_embeddings": False}
    (base / "config.json").write_text(json.dumps(config))
    done("rm-to-critic", folder / "checkpoint-2", tmp_path / "critic", "--to", "openrlhf", "--base", base)
    low, high = (held[f"{PREFIX}score.lora_{x}.default.weight"].float() for x in "AB")
    scale = json.loads((folder / "checkpoint-2" / "adapter_config.json").read_text())
    factor = scale["lora_alpha"] / scale["r"]
    expected = (head.float() + factor * (high @ low)).to(head.dtype)
    assert torch.equal(load_file(tmp_path / "critic" / "model.safetensors")["score.weight"], expected)


def test_a_reward_model_that_zero_3_saved_empty_is_filled_from_the_run_s_shards_on_the_way(tmp_path: Path) -> None:
    folder = copied(tmp_path, "reward")
    ran = done("rm-to-critic", folder / "checkpoint-2", tmp_path / "critic", "--to", "verl")
    assert "weights  " in ran.out
    found, held = load_file(tmp_path / "critic" / "model.safetensors"), repaired_live("reward")
    assert found.pop("score.bias").tolist() == [0.0]
    assert found.keys() == held.keys()
    assert all(torch.equal(found[n], held[n]) for n in held)
    assert json.loads((tmp_path / "critic" / "rlhf-convert.json").read_text())["repaired"]


def test_places_for_lost_weights_are_no_part_of_a_whole_model_s_output(tmp_path: Path) -> None:
    source = zoo.save(SEQCLS, zoo.live("llama"), tmp_path / "rm")
    shutil.copytree(source, tmp_path / "copy")
    ran = done("rm-to-critic", source, tmp_path / "out", "--to", "openrlhf", "--weights-from", tmp_path / "copy")
    assert "nothing to fill" in ran.text
