"""Launch scripts that do not fit the folder that they name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from breakages.sound import Breakage, beside

LAUNCH = ("--launch", "{here}/ppo.sh")
PPO = "python3 -m openrlhf.cli.train_ppo_ray \\\n  "


def script(text: str, name: str = "ppo.sh", *, actor: str = "") -> Callable[[Path], object]:
    """Write a script beside the folder, and an actor that it may name."""

    def change(folder: Path) -> None:
        if actor:
            beside(folder, actor, "actor")
        (folder.parent / name).write_text(text.format(folder=folder.name))

    return change


NAMED = '--reward_pretrain "./{folder}" \\\n  --pretrain org/actor --critic_pretrain org/critic'
OTHER_HEAD = script(f"{PPO}{NAMED} --value_head_prefix value_head")

SCRIPTS: dict[str, Breakage] = {
    "launch-unknown": Breakage("whole", script("python my_own_trainer.py"), "told", LAUNCH),
    "launch-path-missing": Breakage("reward", script(f"{PPO}{NAMED} --pretrain ./nowhere"), "advice", LAUNCH),
    "launch-other-folder": Breakage("reward", script(f"{PPO}--reward_pretrain org/rm"), "told", LAUNCH),
    "launch-same-path": Breakage(
        "reward",
        script(f'{PPO}--critic_pretrain "./{{folder}}" --pretrain "./{{folder}}/" --reward_pretrain org/rm'),
        "advice",
        LAUNCH,
    ),
    "launch-head-name": Breakage("reward", OTHER_HEAD, "advice", LAUNCH),
    "launch-lora": Breakage("adapter", script(f"{PPO}{NAMED} --lora_rank 64"), "advice", LAUNCH),
    "launch-reward-type": Breakage(
        "reward-adapter",
        script(
            'stage: ppo\nfinetuning_type: lora\ntemplate: x\nreward_model: "./{folder}"\nreward_model_type: full\n',
            "ppo.yaml",
        ),
        "advice",
        ("--launch", "{here}/ppo.yaml"),
    ),
    "launch-role": Breakage("whole", script(f"{PPO}{NAMED}"), "advice", LAUNCH),
}
