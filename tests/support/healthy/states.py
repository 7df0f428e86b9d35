"""States of training as DeepSpeed, torch, accelerate and verl wrote them, and folders in the trainers' own forms."""

from __future__ import annotations

from pathlib import Path

import heads_zoo as zoo
from places import RUNS as PLACE

EXPECTED = {
    ("dcp/runs/alone-n1", ".", "deep"): ["nonfinite"],
    ("dcp/runs/hf-n2", "step-2", ""): ["config-missing"],
    ("verl_saves/runs/critic-buffers-fsdp1-n2", ".", ""): ["tensors-unexpected"],
    ("verl_saves/runs/critic-buffers-fsdp1-n2", ".", "deep"): ["tensors-unexpected"],
}
"""What is really so: two steps in fp16 made NaN of every weight, as the run's oracle has it too; torch's writer of
Hugging Face files writes no config, without which nobody loads them; and buffers of a class of the user's own have no
place in the class that config.json names.
"""

RUNS = sorted(
    str(run.relative_to(PLACE))
    for runs in ("zero/runs", "zero/universal_runs", "zero/wrapped_runs", "dcp/runs", "verl_saves/runs")
    for run in (PLACE / runs).iterdir()
    if run.is_dir()
)

OWN_TRAINER: dict[str, tuple[str, ...]] = {
    "hf-seqcls": ("trl", "transformers", "ms-swift", "vllm"),
    "hf-tokcls": ("verl",),
    "openrlhf": ("openrlhf",),
    "openrlhf-old": ("openrlhf@0.5.2",),
    "skyrl": ("skyrl",),
    "trl-vhead": ("trl-valuehead",),
    "llamafactory": ("llamafactory",),
    "dschat": ("deepspeed-chat",),
    "trlx": ("trlx",),
    "safe-rlhf": ("safe-rlhf",),
    "coati": ("colossalchat",),
}
"""Trainers that load a form of `heads_zoo`, which writes it as they do."""

FORMS = [
    (form, family, trainer)
    for form, trainers in OWN_TRAINER.items()
    for trainer in trainers
    for family in zoo.FORMS[form].families
]


def save(form: str, family: str, folder: Path) -> Path:
    """A reward model in a trainer's own form; its config says one label, as that trainer's does."""
    from oracle.bases import edit_config

    zoo.save(zoo.FORMS[form], zoo.live(family), folder)
    edit_config(folder, id2label={"0": "LABEL_0"}, label2id={"LABEL_0": 0}, num_labels=...)
    return folder
