"""Trains for two steps with TRL's own trainers and lets them save; run by TRL's Python.

    PY run_trl.py OUT

OUT gets `base` and a run's folder for each trainer, with LoRA and without: checkpoint-1, checkpoint-2 and the end.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers

SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 160, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
ARGUMENTS: dict[str, Any] = {
    "max_steps": 2, "save_steps": 1, "per_device_train_batch_size": 2, "report_to": [], "use_cpu": True,
    "learning_rate": 1e-2, "bf16": False, "gradient_checkpointing": False, "disable_tqdm": True,
}  # fmt: skip
PAIRS = [{"prompt": f"w{i}", "chosen": f"w{i + 1} w7", "rejected": f"w{i + 2}"} for i in range(8)]
TEXTS = [{"text": f"w{i} w{i + 1} w7"} for i in range(8)]


def _tokenizer() -> Any:
    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{n}" for n in range(150))]
    tokenizer = Tokenizer(models.WordLevel({w: n for n, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )


def _train(out: Path, tokenizer: Any, name: str, lora: bool) -> None:
    trainer, arguments, auto, task, rows = {
        "reward": (trl.RewardTrainer, trl.RewardConfig, "AutoModelForSequenceClassification", "SEQ_CLS", PAIRS),
        "sft": (trl.SFTTrainer, trl.SFTConfig, "AutoModelForCausalLM", "CAUSAL_LM", TEXTS),
        "dpo": (trl.DPOTrainer, trl.DPOConfig, "AutoModelForCausalLM", "CAUSAL_LM", PAIRS),
    }[name]
    torch.manual_seed(0)
    labels = {"num_labels": 1} if task == "SEQ_CLS" else {}
    folder = str(out / (f"{name}-lora" if lora else name))
    run = trainer(
        model=getattr(transformers, auto).from_pretrained(out / "base", **labels),
        args=arguments(output_dir=folder, **ARGUMENTS),
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(rows),
        peft_config=peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type=task) if lora else None,
    )
    run.train()
    run.save_model(folder)


def main(out: Path) -> None:
    """Make the base and every run."""
    tokenizer = _tokenizer()
    torch.manual_seed(0)
    transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES)).save_pretrained(out / "base")
    tokenizer.save_pretrained(out / "base")
    for name in ("reward", "sft", "dpo"):
        for lora in (False, True):
            _train(out, tokenizer, name, lora)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
