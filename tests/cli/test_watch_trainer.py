"""`watch` beside a real transformers Trainer: each checkpoint is judged once, over a kill and a restart."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from watching import judged_over_a_kill

TRAINER = """
import sys, time, torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

class Slow(TrainerCallback):
    def on_step_end(self, *_, **__):
        time.sleep(1.0)

torch.manual_seed(0)
sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)
model = LlamaForCausalLM(LlamaConfig(vocab_size=512, **sizes))
rows = [{"input_ids": torch.arange(4) + i, "labels": torch.arange(4) + i} for i in range(16)]
arguments = TrainingArguments(
    sys.argv[1], max_steps=5, save_steps=1, save_total_limit=None, per_device_train_batch_size=2, report_to=[],
    use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False,
)
Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[Slow()]).train()
"""


@pytest.mark.slow
@pytest.mark.parametrize("notify", ["poll", "inotify"])
def test_each_checkpoint_of_a_trainer_is_judged_once_and_whole(notify: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    quiet = os.environ | {"TOKENIZERS_PARALLELISM": "false"}
    with subprocess.Popen([sys.executable, "-c", TRAINER, str(run)], env=quiet) as writer:
        told = judged_over_a_kill(run, tmp_path / "state.json", writer, notify)
    assert writer.returncode == 0
    assert told == [(f"checkpoint-{step}", "sound") for step in range(1, 6)]
