"""Launch scripts as people write them: continued lines, variables and their defaults, arrays, several commands."""

from __future__ import annotations

from pathlib import Path

import pytest

from converter.examine.diagnoses.script import read_launch
from doctored import codes, serious

OPENRLHF = r"""#!/bin/bash
set -x
# --critic_pretrain ./old-critic was before
export ACTOR=${ACTOR:-./lm}
REWARD="./rm"
CRITIC=${CRITIC_PATH:-"./critic"}
ray start --head --node-ip-address 0.0.0.0 --num-gpus 8
read -r -d '' training_commands <<EOF
openrlhf.cli.train_ppo_ray \
   --ref_num_nodes 1 \
   --pretrain $ACTOR \
   --reward_pretrain "${REWARD}" \
   --critic_pretrain ${CRITIC} \
   --value_head_prefix score
EOF
ray job submit --address="http://127.0.0.1:8265" -- python3 -m $training_commands
"""
ARRAY = r"""
ARGS=(
  --pretrain ./lm   # the policy
  --reward_pretrain ./rm
  --critic_pretrain "./critic"
)
python -m openrlhf.cli.train_ppo_ray "${ARGS[@]}" --value_head_prefix=score; echo done
"""
STAGES = r"""
deepspeed --module openrlhf.cli.train_sft --pretrain ./base --save_path ./lm && echo ok
deepspeed --module openrlhf.cli.train_rm --pretrain ./lm --save_path ./rm --lora_rank 8
python -m openrlhf.cli.train_ppo --pretrain ./lm --reward_pretrain ./rm --critic_pretrain ./critic
"""
VERL = r"""
MODEL_PATH=${MODEL_PATH:-./lm}
python3 -m verl.trainer.main_ppo \
    data.train_files="['/data/a.parquet']" \
    actor_rollout_ref.model.path=$MODEL_PATH \
    critic.model.path=./critic +critic.model.tokenizer_path=${MODEL_PATH} \
    reward_model.model.path="./rm" \
    trainer.logger=['console'] $@ 2>&1 | tee log.txt
"""
DSCHAT = r"""
ACTOR_MODEL_PATH=${1:-./lm}
CRITIC_MODEL_PATH=${2:-./critic}
if [ "$OUTPUT" == "" ]; then
    OUTPUT=./output
fi
deepspeed --master_port 12346 main.py --data_path Dahoas/rm-static \
   --actor_model_name_or_path $ACTOR_MODEL_PATH --critic_model_name_or_path $CRITIC_MODEL_PATH \
   --offload_reference_model &> $OUTPUT/training.log
"""
TRL = r"""
accelerate launch --config_file examples/accelerate_configs/deepspeed_zero2.yaml --num_processes 8 \
    examples/scripts/ppo/ppo.py \
    --model_name_or_path ./lm --sft_model_path=./lm \
    --reward_model_path "./rm" # the reward model
"""
FACTORY = "CUDA_VISIBLE_DEVICES=0,1 FORCE_TORCHRUN=1 llamafactory-cli train conf/ppo.yaml\n"
FACTORY_YAML = """### model
model_name_or_path: ./lm
reward_model: ./rm   # an adapter
stage: ppo
finetuning_type: lora
template: qwen
"""


@pytest.mark.parametrize(
    ("text", "trainer", "roles"),
    [
        (OPENRLHF, "openrlhf", {"actor": "./lm", "reward": "./rm", "critic": "./critic"}),
        (ARRAY, "openrlhf", {"actor": "./lm", "reward": "./rm", "critic": "./critic"}),
        (STAGES, "openrlhf", {"actor": "./lm", "reward": "./rm", "critic": "./critic"}),
        (VERL, "verl", {"actor": "./lm", "reward": "./rm", "critic": "./critic"}),
        (DSCHAT, "deepspeed-chat", {"actor": "./lm", "critic": "./critic"}),
        (TRL, "trl", {"actor": "./lm", "reward": "./rm"}),
        (FACTORY, "llamafactory", {"actor": "./lm", "reward": "./rm"}),
    ],
)
def test_a_script_s_trainer_and_its_models_are_read_as_a_shell_would_pass_them(
    tmp_path: Path, text: str, trainer: str, roles: dict[str, str]
) -> None:
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "ppo.yaml").write_text(FACTORY_YAML)
    (tmp_path / "run.sh").write_text(text)
    read = read_launch(str(tmp_path / "run.sh"))
    assert read.trainer == trainer
    assert {role: value for _, role, value in read.models()} == roles


def test_what_only_a_shell_can_compute_is_not_judged(tmp_path: Path) -> None:
    text = "python -m openrlhf.cli.train_ppo --pretrain $1 --reward_pretrain $(ls -d rm*) --critic_pretrain ${X}/c\n"
    (tmp_path / "run.sh").write_text(text)
    read = read_launch(str(tmp_path / "run.sh"))
    assert list(read.models()) == []
    assert read.computed == {"pretrain", "reward_pretrain", "critic_pretrain"}


def test_a_folder_that_an_earlier_command_of_the_script_writes_is_not_missing(
    reward: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.sh").write_text(STAGES)
    assert "launch-path-missing" in codes(reward, launch="run.sh")  # ./critic, which none writes
    (tmp_path / "critic").mkdir()
    assert serious(codes(reward, launch="run.sh")) == set()  # ./lm, which the first one writes


def test_options_of_another_command_are_not_those_of_the_one_that_trains(tmp_path: Path) -> None:
    (tmp_path / "run.sh").write_text(STAGES)
    assert "lora_rank" not in read_launch(str(tmp_path / "run.sh")).options
