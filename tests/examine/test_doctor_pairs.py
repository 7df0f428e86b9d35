"""Two folders and a script: what does not fit between critic and actor, and between a launch script and its folders."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForTokenClassification

from converter.errors import UsageError
from converter.examine.diagnoses.script import read_launch
from doctored import SIZES, adapter, codes, edit, finding, serious, store


def tokenizer(folder: Path, **tokens: int) -> None:
    """A tokenizer as the tokenizers library writes it."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    Tokenizer(WordLevel({"a": 0, "b": 1, "[UNK]": 2} | tokens, unk_token="[UNK]")).save(str(folder / "tokenizer.json"))


@pytest.fixture
def pair(causal: Path, reward: Path) -> tuple[Path, Path]:
    """A critic and its actor, which fit."""
    for folder in (causal, reward):
        tokenizer(folder)
        (folder / "chat_template.jinja").write_text("{{ messages }}")
    return reward, causal


def with_actor(pair: tuple[Path, Path]) -> dict[str, str]:
    return codes(pair[0], actor=str(pair[1]))


def test_a_critic_and_an_actor_that_fit_have_no_finding(pair: tuple[Path, Path]) -> None:
    assert with_actor(pair) == {}


def test_one_folder_for_both_is_an_error(pair: tuple[Path, Path]) -> None:
    assert with_actor((pair[0], pair[0])) == {"pair-same-path": "error"}


def test_tokens_with_other_numbers_are_an_error_and_tokens_of_one_side_change_numbers(pair: tuple[Path, Path]) -> None:
    tokenizer(pair[0], c=3)
    assert with_actor(pair) == {"pair-tokenizer": "changes-numbers"}
    tokenizer(pair[0], a=1, b=0)
    assert with_actor(pair) == {"pair-tokenizer": "error"}


def test_other_rows_templates_special_tokens_and_dtypes_are_named(pair: tuple[Path, Path]) -> None:
    critic, actor = pair
    (critic / "chat_template.jinja").write_text("other")
    assert with_actor(pair) == {"pair-chat-template": "cosmetic"}
    edit(critic, eos_token_id=7)
    assert with_actor(pair)["pair-special-tokens"] == "changes-numbers"
    store(actor, lambda t: {n: v.to(torch.bfloat16) for n, v in t.items()})
    edit(actor, dtype="bfloat16")
    assert with_actor(pair)["pair-dtype"] == "cosmetic"
    LlamaForCausalLM(LlamaConfig(**SIZES | {"vocab_size": 40})).save_pretrained(actor)
    assert with_actor(pair)["pair-vocabulary"] == "changes-numbers"


@pytest.mark.filterwarnings("ignore")
def test_adapters_of_another_rank_are_mentioned_and_no_fault(causal: Path, tmp_path: Path) -> None:
    a, b = adapter(causal, tmp_path / "a"), adapter(causal, tmp_path / "b")
    assert codes(a, actor=str(b)) == {}
    edit(b, "adapter_config.json", r=64)
    assert codes(a, actor=str(b)) == {"pair-lora": "cosmetic"}


@pytest.mark.filterwarnings("ignore")
def test_the_adapter_that_verl_s_merger_leaves_beside_the_base_changes_numbers(causal: Path) -> None:
    wrapped = get_peft_model(LlamaForCausalLM.from_pretrained(causal), LoraConfig(r=2, target_modules=["q_proj"]))
    wrapped.save_pretrained(causal / "lora_adapter")
    assert codes(causal) == {"adapter-left-beside": "changes-numbers"}
    assert str(finding(causal, "adapter-left-beside").next) == (
        f"rlhf-convert merge-lora {causal}/lora_adapter {causal}-merged --base {causal}"
    )


OPENRLHF = """\
set -x
RM={reward}
read -r -d '' training_commands <<EOF
openrlhf.cli.train_ppo_ray \\
   --pretrain {actor} \\
   --reward_pretrain $RM \\
   --critic_pretrain {critic} \\
   --value_head_prefix {prefix} \\
   --lora_rank 8 --save_path "$OUT/ppo" # a comment
EOF
deepspeed --module $training_commands
"""


def script(folder: Path, text: str, name: str = "ppo.sh") -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def test_a_script_that_fits_has_only_what_its_trainer_reads(reward: Path, causal: Path, tmp_path: Path) -> None:
    critic = shutil.copytree(reward, tmp_path / "critic")
    text = OPENRLHF.format(reward=reward, actor=causal, critic=critic, prefix="score")
    path = script(tmp_path, text)
    assert codes(reward, launch=path) == {"loader-accepts": "cosmetic"}
    assert codes(causal, launch=path) == {"loader-accepts": "cosmetic"}
    read = read_launch(path)
    assert (read.trainer, read.options["reward_pretrain"]) == ("openrlhf", str(reward))
    assert read.computed == {"save_path"}


def test_a_script_with_one_path_for_actor_and_critic_or_a_path_that_is_not_there_is_an_error(
    reward: Path, causal: Path, tmp_path: Path
) -> None:
    text = OPENRLHF.format(reward=reward, actor=causal, critic=f"{causal}/", prefix="score")
    assert serious(codes(reward, launch=script(tmp_path, text))) == {"launch-same-path"}
    text = OPENRLHF.format(reward=reward, actor=causal, critic="./nowhere", prefix="score")
    assert serious(codes(reward, launch=script(tmp_path, text))) == {"launch-path-missing"}
    text = OPENRLHF.format(reward=reward, actor=causal, critic="some-org/some-model", prefix="score")
    assert serious(codes(reward, launch=script(tmp_path, text))) == set()


def test_a_script_s_head_name_that_is_not_the_folder_s_is_an_error_unless_the_config_names_it(
    reward: Path, causal: Path, tmp_path: Path
) -> None:
    text = OPENRLHF.format(reward=reward, actor=causal, critic="org/critic", prefix="value_head")
    assert "launch-head-name" in serious(codes(reward, launch=script(tmp_path, text)))
    edit(reward, value_head_prefix="score")
    assert "launch-head-name" not in codes(reward, launch=script(tmp_path, text))


def test_a_script_that_does_not_use_the_folder_or_uses_it_otherwise_says_so(
    reward: Path, causal: Path, tmp_path: Path
) -> None:
    text = OPENRLHF.format(reward="org/rm", actor="org/lm", critic="org/critic", prefix="score")
    assert codes(reward, launch=script(tmp_path, text))["launch-other-folder"] == "cosmetic"
    text = OPENRLHF.format(reward=causal, actor="org/lm", critic="org/critic", prefix="score")
    assert {"launch-role", "loader-random"} <= serious(codes(causal, launch=script(tmp_path, text)))
    text = OPENRLHF.format(reward="org/rm", actor=reward, critic="org/critic", prefix="score")
    assert "launch-role" in serious(codes(reward, launch=script(tmp_path, text)))


def test_hydra_s_options_of_verl_and_deepspeed_chat_s_are_read(tmp_path: Path) -> None:
    LlamaForTokenClassification(LlamaConfig(**SIZES, num_labels=1)).save_pretrained(tmp_path / "critic")
    text = f"python3 -m verl.trainer.main_ppo \\\n critic.model.path='{tmp_path}/critic' +trainer.x=1 $@\n"
    read = read_launch(script(tmp_path, text))
    assert (read.trainer, read.roles_of(tmp_path / "critic")) == ("verl", ["critic"])
    assert serious(codes(tmp_path / "critic", launch=read.path)) == set()
    text = "deepspeed main.py --actor_model_name_or_path org/a --critic_model_name_or_path=./critic\n"
    read = read_launch(script(tmp_path, text))
    assert (read.trainer, read.options["critic_model_name_or_path"]) == ("deepspeed-chat", "./critic")
    assert "loader-refuses" in serious(codes(tmp_path / "critic", launch=read.path))


@pytest.mark.filterwarnings("ignore")
def test_llamafactory_s_kind_of_reward_model_must_be_the_folder_s(causal: Path, tmp_path: Path) -> None:
    folder = adapter(causal, tmp_path / "adapter")
    text = f"stage: ppo\nfinetuning_type: lora\ntemplate: qwen\nreward_model: {folder}\nreward_model_type: full\n"
    assert "launch-reward-type" in serious(codes(folder, launch=script(tmp_path, text, "ppo.yaml")))
    shell = script(tmp_path, "llamafactory-cli train ppo.yaml reward_model_type=lora\n", "run.sh")
    assert read_launch(shell).options["reward_model"] == str(folder)
    assert "launch-reward-type" not in codes(folder, launch=shell)


@pytest.mark.filterwarnings("ignore")
def test_a_script_s_rank_that_is_not_the_adapter_s_changes_numbers(causal: Path, tmp_path: Path) -> None:
    folder = adapter(causal, tmp_path / "adapter")
    text = OPENRLHF.format(reward=folder, actor=causal, critic="org/critic", prefix="score")
    assert codes(folder, launch=script(tmp_path, text))["launch-lora"] == "changes-numbers"


def test_a_script_of_nothing_known_is_said_and_one_that_is_missing_is_a_usage_error(
    causal: Path, tmp_path: Path
) -> None:
    assert codes(causal, launch=script(tmp_path, "echo 'unclosed\n")) == {"launch-unknown": "cosmetic"}
    with pytest.raises(UsageError) as caught:
        codes(causal, launch=str(tmp_path / "none.sh"))
    assert caught.value.code == "launch-unreadable"


def test_nothing_of_a_script_is_run(causal: Path, tmp_path: Path) -> None:
    text = f"trl ppo --reward_model_path $(touch {tmp_path}/ran) `touch {tmp_path}/ran`\n"
    assert codes(causal, launch=script(tmp_path, text))["launch-other-folder"] == "cosmetic"
    assert not (tmp_path / "ran").exists()
