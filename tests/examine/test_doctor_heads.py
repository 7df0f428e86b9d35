"""Heads: each way of losing one is named on a reward model that transformers or PEFT wrote and that was then broken;
what trainers write is left alone.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForTokenClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
)

from converter.examine.doctor import DoctorRequest, examine
from doctored import HIDDEN, RUN, SIZES, adapter, codes, edit, finding, serious, store, value_head


def test_a_reward_model_whose_head_was_dropped_is_an_error_and_transformers_makes_a_random_one(reward: Path) -> None:
    store(reward, lambda t: {n: v for n, v in t.items() if n != "score.weight"})
    assert codes(reward) == {"head-missing": "error"}
    assert finding(reward, "head-missing").recoverability == "lost"
    torch.manual_seed(1)
    one = AutoModelForSequenceClassification.from_pretrained(reward).score.weight
    torch.manual_seed(2)
    assert not torch.equal(one, AutoModelForSequenceClassification.from_pretrained(reward).score.weight)


@pytest.mark.filterwarnings("ignore")
def test_a_head_that_an_adapter_beside_still_has_is_recoverable_from_it(reward: Path, causal: Path) -> None:
    adapter(causal, reward / "adapter")
    store(reward, lambda t: {n: v for n, v in t.items() if n != "score.weight"})
    found = finding(reward, "head-missing")
    assert found.recoverability == f"from {reward}/adapter"
    assert str(found.next) == f"rlhf-convert merge-lora {reward}/adapter {reward}-merged"


def test_a_head_that_the_run_s_shards_may_hold_is_recoverable_from_them(reward: Path) -> None:
    store(reward, lambda t: {n: v for n, v in t.items() if n != "score.weight"})
    shutil.copytree(RUN / "reward" / "checkpoint-2" / "global_step2", reward / "global_step2")
    assert finding(reward, "head-missing").recoverability == f"from {reward}/global_step2"


def test_a_head_under_another_name_is_an_error_and_nothing_is_lost(reward: Path) -> None:
    store(reward, lambda t: {n.replace("score.", "reward_head."): v for n, v in t.items()})
    assert serious(codes(reward)) == {"head-named-otherwise"}
    assert finding(reward, "head-named-otherwise").recoverability == "here"


def test_a_head_that_is_only_wrapped_is_repaired_and_not_converted(reward: Path) -> None:
    store(reward, lambda t: {f"_orig_mod.{n}": v for n, v in t.items()})
    named = finding(reward, "head-named-otherwise").next
    assert str(named) == f"rlhf-convert repair {reward} {reward}-fixed"
    assert named == finding(reward, "names-wrapped").next


def test_an_empty_head_without_shards_is_offered_from_a_copy_with_the_base_that_proves_it(reward: Path) -> None:
    """A copy may be the base itself, with a head that was drawn at random: the base shows that it was trained."""
    whole = shutil.copytree(reward, reward.parent / "aside" / reward.name)
    store(reward, lambda t: {n: v.new_empty(0) if n == "score.weight" else v for n, v in t.items()})
    found = finding(reward, "zero3-empty-tensors")
    assert found.recoverability == "lost"
    assert str(found.next).endswith(f"rlhf-convert inspect {reward} --tensors")
    shutil.move(whole, reward.parent / f"{reward.name}-checkpoint-5")
    there = f"{reward.parent / reward.name}-checkpoint-5"
    found = finding(reward, "zero3-empty-tensors")
    words = f"repair {reward} {reward}-fixed --weights-from {there}"
    assert str(found.next) == f"{words} with --base and the folder or the Hub name of the base model"


def test_openrlhf_s_head_is_where_its_config_says_or_missing(reward: Path) -> None:
    edit(reward, architectures=["RewardModel"], value_head_prefix="value_head", drop=("id2label", "label2id"))
    assert codes(reward)["architecture-openrlhf"] == "cosmetic"
    store(reward, lambda t: {n.replace("score.", "value_head."): v for n, v in t.items()})
    assert serious(codes(reward)) == set()
    store(reward, lambda t: {n: v for n, v in t.items() if n != "value_head.weight"})
    assert serious(codes(reward)) == {"head-missing"}


def test_a_value_head_in_a_file_of_its_own_is_mentioned_with_the_command_that_converts_it(causal: Path) -> None:
    value_head(causal)
    assert codes(causal) == {"head-dialect": "cosmetic"}
    found = finding(causal, "head-dialect")
    assert "LLaMA-Factory" in found.text
    assert str(found.next) == f"rlhf-convert convert {causal} {causal}-converted --to trl --role reward"


def test_trl_s_value_head_inside_the_model_is_mentioned_and_no_fault(causal: Path) -> None:
    store(causal, lambda t: {**t, "v_head.summary.weight": torch.ones(1, HIDDEN), "v_head.summary.bias": torch.ones(1)})
    assert codes(causal) == {"head-dialect": "cosmetic"}


def test_two_heads_change_numbers_since_loaders_choose(reward: Path, causal: Path) -> None:
    store(reward, lambda t: {**t, "value_head.weight": torch.ones(1, HIDDEN)})
    assert serious(codes(reward)) == {"heads-several"}
    value_head(causal)
    value_head(causal, "value_head.bin")
    assert serious(codes(causal, deep=True)) == {"heads-several"}


def test_a_head_of_two_rows_that_the_config_knows_is_a_classifier_and_no_fault(tmp_path: Path) -> None:
    LlamaForSequenceClassification(LlamaConfig(**SIZES, num_labels=2)).save_pretrained(tmp_path / "rm")
    assert codes(tmp_path / "rm") == {"head-rows": "cosmetic"}


def test_a_head_in_a_sharded_shape_is_an_error(reward: Path) -> None:
    store(reward, lambda t: {**t, "score.weight": t["score.weight"].reshape(8, HIDDEN // 8).contiguous()})
    assert "head-reshaped" in serious(codes(reward))
    with pytest.raises(RuntimeError):
        AutoModelForSequenceClassification.from_pretrained(reward)


def test_a_bias_that_sequence_classification_ignores_changes_numbers(reward: Path) -> None:
    store(reward, lambda t: {**t, "score.bias": torch.ones(1)})
    assert serious(codes(reward)) == {"head-bias"}
    assert "bias" not in dict(AutoModelForSequenceClassification.from_pretrained(reward).score.named_parameters())
    store(reward, lambda t: {**t, "score.bias": torch.zeros(1)})
    assert serious(codes(reward, deep=True)) == {"tensors-unexpected"}  # of no weight, and left over all the same


def test_a_normaliser_that_openrlhf_fails_on_is_an_error(reward: Path) -> None:
    edit(reward, architectures=["RewardModel"], mean=0.5)
    assert serious(codes(reward)) == {"normaliser-broken"}
    edit(reward, mean=0.5, std=2.0)
    assert serious(codes(reward)) == set()


def test_a_normaliser_that_the_source_has_and_the_model_lost_changes_numbers(reward: Path, tmp_path: Path) -> None:
    shutil.copytree(reward, tmp_path / "source")
    edit(tmp_path / "source", mean=0.5, std=2.0)
    assert serious(codes(reward, weights_from=(str(tmp_path / "source"),))) == {"normaliser-lost"}


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_with_a_head_and_the_task_of_a_language_model_changes_numbers(causal: Path, tmp_path: Path) -> None:
    folder = adapter(causal, tmp_path / "adapter")
    assert serious(codes(folder)) == set()
    edit(folder, "adapter_config.json", task_type="CAUSAL_LM")
    assert "task-type-wrong" in serious(codes(folder))


@pytest.mark.filterwarnings("ignore")
def test_a_merge_that_left_the_adapter_s_head_behind_is_an_error(causal: Path, tmp_path: Path) -> None:
    folder = adapter(causal, tmp_path / "lora-of-rm")
    shutil.copytree(causal, tmp_path / "merged")
    assert serious(codes(tmp_path / "merged")) == set()
    found = codes(tmp_path / "merged", weights_from=(str(folder),))
    assert serious(found) == {"merged-without-head"}


@pytest.mark.filterwarnings("ignore")
def test_a_base_model_beside_a_reward_adapter_is_sound(causal: Path, tmp_path: Path) -> None:
    adapter(causal, tmp_path / "lm-adapter")
    assert codes(causal) == {}


def test_a_head_with_lora_whose_weight_the_shards_still_hold_leads_to_one_command(tmp_path: Path) -> None:
    folder = shutil.copytree(RUN / "head" / "checkpoint-2", tmp_path / "rm")
    assert {"head-base-lost", "zero3-empty-tensors"} <= serious(codes(folder))
    commands = {
        str(f.next) for f in examine(DoctorRequest(str(folder), target="openrlhf")).findings if f.severity == "error"
    }
    begun = f"convert {folder} {folder}-converted --to openrlhf --role reward with --base and "
    assert [c.startswith(begun) for c in commands] == [True]
    given = {"base": str(RUN / "lora" / "base"), "target": "openrlhf"}
    commands = {
        str(f.next) for f in examine(DoctorRequest(str(folder), **given)).findings if f.severity == "error" and f.next
    }
    assert (
        f"rlhf-convert convert {folder} {folder}-converted --to openrlhf --role reward --base {RUN}/lora/base"
        in commands
    )


def test_other_heads_that_transformers_writes_have_no_finding(tmp_path: Path) -> None:
    sizes = {k: v for k, v in SIZES.items() if k != "num_key_value_heads"}
    BertForSequenceClassification(BertConfig(**sizes)).save_pretrained(tmp_path / "bert")
    LlamaForTokenClassification(LlamaConfig(**SIZES, num_labels=1)).save_pretrained(tmp_path / "critic")
    config = GPT2Config(n_embd=8, n_head=2, n_layer=1, vocab_size=16, pad_token_id=0, num_labels=1)
    GPT2ForTokenClassification(config).save_pretrained(tmp_path / "gpt2")
    for name in ("bert", "critic", "gpt2"):
        assert serious(codes(tmp_path / name, deep=True)) == set(), name
