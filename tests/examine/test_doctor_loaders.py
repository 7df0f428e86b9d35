"""`doctor --for`: what a trainer's loader does with a folder that another wrote; and that unknown trainers are told."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

import heads_zoo as zoo
from converter.errors import UsageError
from converter.examine.doctor import DoctorRequest, examine
from doctored import RUN, adapter, codes, edit, finding, serious, value_head


@pytest.mark.parametrize(
    "trainer", ["trl", "transformers", "ms-swift", "vllm", "openrlhf", "openrlhf@0.11.2", "nemo-rl"]
)
def test_a_reward_model_of_transformers_is_read_by_those_who_load_its_class(reward: Path, trainer: str) -> None:
    found = codes(reward, target=trainer)
    assert found["loader-accepts"] == "cosmetic"
    assert serious(found) - {"loader-refuses"} == set()


@pytest.mark.parametrize(
    ("trainer", "code", "word"),
    [
        ("trl-valuehead", "loader-random", "silently"),
        ("llamafactory", "loader-random", "silently"),
        ("skyrl", "loader-random", "value_head"),
        ("deepspeed-chat", "loader-refuses", "pytorch_model.bin"),
        ("trlx", "loader-refuses", "pytorch_model.bin"),
        ("colossalchat", "loader-refuses", "modeling"),
    ],
)
def test_trainers_that_look_elsewhere_for_the_head_are_told(reward: Path, trainer: str, code: str, word: str) -> None:
    found = [f for f in examine(DoctorRequest(str(reward), target=trainer)).findings if f.code == code]
    assert any(word in f.text for f in found)
    assert found[0].next is not None
    assert f"--to {trainer} --role " in str(found[0].next)


def test_a_head_that_openrlhf_s_new_name_does_not_find_is_random_and_the_old_version_reads_it(reward: Path) -> None:
    tensors = load_file(reward / "model.safetensors")
    save_file({n.replace("score.", "value_head."): t for n, t in tensors.items()}, reward / "model.safetensors")
    edit(reward, architectures=["RewardModel"], drop=("id2label", "label2id"))
    assert "loader-random" in serious(codes(reward, target="openrlhf"))
    assert "loader-random" in serious(codes(reward, target="openrlhf@0.11.2"))
    assert serious(codes(reward, target="openrlhf@0.5.2")) == set()


def test_llamafactory_reads_its_own_folder_and_openrlhf_begins_at_random(causal: Path) -> None:
    value_head(causal)
    assert serious(codes(causal, target="llamafactory")) == set()
    assert "loader-random" in serious(codes(causal, target="openrlhf"))


def test_verl_needs_a_class_with_a_bias_and_says_what_it_does_to_others(reward: Path) -> None:
    found = finding(reward, "loader-refuses", target="verl@0.9.1")
    assert "LlamaForTokenClassification" in found.text


def test_a_bias_is_left_out_by_trainers_without_one(reward: Path) -> None:
    tensors = load_file(reward / "model.safetensors")
    save_file({**tensors, "score.bias": torch.ones(1)}, reward / "model.safetensors")
    edit(reward, architectures=["LlamaForTokenClassification"])
    found = codes(reward, target="openrlhf")
    assert found["loader-changes"] == "changes-numbers"


def test_rows_that_a_trainer_does_not_build_are_refused(reward: Path) -> None:
    tensors = load_file(reward / "model.safetensors")
    save_file({**tensors, "score.weight": torch.ones(2, 16)}, reward / "model.safetensors")
    edit(reward, id2label={"0": "a", "1": "b"}, label2id={"a": 0, "b": 1})
    assert "loader-refuses" in serious(codes(reward, target="openrlhf"))
    assert serious(codes(reward, target="transformers")) == set()


def test_mean_and_std_are_garbage_under_transformers_5_and_right_before(reward: Path) -> None:
    edit(reward, architectures=["RewardModel"], mean=0.5, std=2.0)
    assert serious(codes(reward, target="openrlhf@0.11.2")) == {"loader-changes"}
    assert serious(codes(reward, target="openrlhf@0.5.5")) == set()


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_has_to_be_merged_for_trainers_that_load_models(causal: Path, tmp_path: Path) -> None:
    folder = adapter(causal, tmp_path / "adapter")
    assert serious(codes(folder, target="openrlhf")) == {"loader-refuses"}
    assert serious(codes(folder, target="llamafactory")) == {"loader-random"}
    value_head(folder)
    assert serious(codes(folder, target="llamafactory")) - {"heads-several"} == set()


@pytest.mark.filterwarnings("ignore")
def test_a_reward_adapter_s_head_is_left_out_by_older_transformers_and_this_one_reads_it(
    causal: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForSequenceClassification

    folder = adapter(causal, tmp_path / "adapter")
    assert serious(codes(folder, target="trl")) == {"loader-random"}
    assert "5.23 reads it" in finding(folder, "loader-random", target="trl").text
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    saved = load_file(folder / "adapter_model.safetensors")["base_model.model.score.weight"]
    assert torch.equal(dict(model.named_parameters())["score.modules_to_save.default.weight"], saved)


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_of_a_language_model_is_an_actor_for_trl(causal: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = get_peft_model(LlamaForCausalLM.from_pretrained(causal), LoraConfig(r=2, task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "adapter")
    assert serious(codes(tmp_path / "adapter", target="trl")) == set()
    tokens = torch.tensor([[3, 4, 5]])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(loaded(tokens).logits, model.eval()(tokens).logits)


@pytest.mark.parametrize("trainer", ["trl", "openrlhf", "verl", "llamafactory", "ms-swift"])
def test_a_language_model_that_nobody_calls_a_reward_model_is_no_fault(causal: Path, trainer: str) -> None:
    assert serious(codes(causal, target=trainer)) == set()


def test_shards_are_refused_by_every_loader_with_the_command_that_gathers_and_converts(tmp_path: Path) -> None:
    folder = shutil.copytree(RUN / "reward" / "checkpoint-2" / "global_step2", tmp_path / "run" / "global_step2")
    found = finding(folder, "loader-refuses", target="openrlhf")
    assert str(found.next) == f"rlhf-convert convert {folder} {folder}-converted --to openrlhf --role reward"


def test_a_language_model_is_read_as_an_actor(causal: Path) -> None:
    found = [
        f.text for f in examine(DoctorRequest(str(causal), target="openrlhf")).findings if f.code == "loader-accepts"
    ]
    assert found == ["openrlhf 0.11.2 reads it as an actor"]


@pytest.mark.parametrize(
    ("form", "trainer"),
    [
        ("hf-seqcls", "trl"),
        ("hf-tokcls", "verl"),
        ("openrlhf", "openrlhf"),
        ("openrlhf-old", "openrlhf@0.5.2"),
        ("skyrl", "skyrl"),
        ("trl-vhead", "trl-valuehead"),
        ("llamafactory", "llamafactory"),
        ("dschat", "deepspeed-chat"),
        ("trlx", "trlx"),
        ("safe-rlhf", "safe-rlhf"),
    ],
)
def test_every_dialect_is_sound_and_read_by_its_own_trainer(tmp_path: Path, form: str, trainer: str) -> None:
    folder = zoo.save(zoo.FORMS[form], zoo.live("llama"), tmp_path / "m")
    found = codes(folder, target=trainer)
    assert {c for c in serious(found) if c not in ("labels-mismatch", "loader-changes")} == set()
    assert found["loader-accepts"] == "cosmetic"
    assert {c for c in serious(codes(folder)) if c not in ("names-of-a-trainer", "labels-mismatch")} == set()


def test_an_unknown_trainer_or_version_is_told_with_those_that_are_known(causal: Path) -> None:
    with pytest.raises(UsageError) as caught:
        examine(DoctorRequest(str(causal), target="openrlfh"))
    assert caught.value.code == "unknown-trainer"
    assert "openrlhf, " in str(caught.value.expected)
    assert caught.value.next == "did you mean `openrlhf`?"
    with pytest.raises(UsageError) as caught:
        examine(DoctorRequest(str(causal), target="openrlhf@99"))
    assert caught.value.code == "trainer-version"


def test_transformers_4_is_a_stack_of_libraries_and_no_loader(causal: Path) -> None:
    assert codes(causal, target="transformers@4") == {}
    assert codes(causal, target="transformers@4.46") == {}


def test_what_a_loader_is_said_to_make_random_transformers_makes_random(reward: Path, tmp_path: Path) -> None:
    """The claim of `loader-random` about a causal model, by transformers itself."""
    from transformers import AutoModelForSequenceClassification

    LlamaForCausalLM.from_pretrained(reward).save_pretrained(tmp_path / "lm")
    edit(tmp_path / "lm", architectures=["LlamaForSequenceClassification"])
    assert "loader-random" in serious(codes(tmp_path / "lm", target="trl"))
    heads = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        heads.append(AutoModelForSequenceClassification.from_pretrained(tmp_path / "lm", num_labels=1).score.weight)
    assert not torch.equal(*heads)
