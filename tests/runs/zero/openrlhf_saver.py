"""Trains OpenRLHF's reward model with LoRA under real ZeRO-3 on two CPU ranks, and has what its saver writes examined.

    PY tests/runs/zero/openrlhf_saver.py OUT TARGETS
    PY tests/runs/zero/openrlhf_saver.py OUT whole     no LoRA, four saves, and nothing is examined here

Needs `openrlhf`, `deepspeed`, `peft`, `torchdata`. TARGETS is `all-linear`, OpenRLHF's own default, which puts LoRA on
the head too: its frozen values, which OpenRLHF drew at random, are in no file of the save. Or names of modules with
commas between. OUT gets `rank-R.json`: the steps that were done, the error, and the count of parameters in memory.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[3] / "converter" / "examine" / "verify" / "probes"))
from probe_common import stand_in_for

from ranks import run_ranks

RANKS = 2
WHOLE = "whole"
SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 160, "pad_token_id": 0,
}  # fmt: skip
ZERO = {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True, "stage3_param_persistence_threshold": 0}
CONFIG = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": ZERO, "zero_force_ds_cpu_optimizer": False}


class NoTokenizer:
    """In place of the tokenizer, of which OpenRLHF's saver asks one thing."""

    def save_pretrained(self, folder: str) -> None:
        """Nothing: this model's tokens have no text."""


def launch(out: Path, targets: str) -> None:
    """Write the base, start one process a rank and wait for them."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    Qwen2ForCausalLM(Qwen2Config(**SIZES)).save_pretrained(out / "base")
    run_ranks(RANKS, __file__, out, targets, "--worker", seconds=300)


def work(out: Path, targets: str) -> None:
    """One rank."""
    # What OpenRLHF imports and a save does not use; all but bitsandbytes need a GPU.
    stand_in_for("flash_attn", "ring_flash_attn", "ray", "vllm", "bitsandbytes")
    import deepspeed

    # An operator that is compiled at first use; gloo's own does the same.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", verbose=False)
    from converter.integrations import BrokenCheckpoint

    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("converter.integrations").setLevel(logging.INFO)
    steps, error, model = [0], None, _model(out, targets)
    try:
        _train(out, model, steps, saves=4 if targets == WHOLE else 2, is_examined=targets != WHOLE)
    except BrokenCheckpoint as broken:
        error = {"code": broken.code, "what": broken.what, "next": str(broken.next), "where": broken.where}
    held = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
    told = {"steps": steps[0], "error": error, "parameters": held}
    (out / f"rank-{os.environ['RANK']}.json").write_text(json.dumps(told))


def _model(out: Path, targets: str) -> Any:
    from openrlhf.models.model import get_llm_for_sequence_regression

    return get_llm_for_sequence_regression(
        str(out / "base"), "reward", lora_rank=0 if targets == WHOLE else 4, lora_alpha=8, ds_config=CONFIG,
        init_value_head=True,
        target_modules=targets if targets == "all-linear" else targets.split(","), attn_implementation="eager",
    )  # fmt: skip


def _train(out: Path, model: Any, steps: list[int], *, saves: int, is_examined: bool) -> None:
    import deepspeed
    import torch
    import torch.distributed as dist
    from openrlhf.utils.deepspeed.deepspeed import DeepspeedStrategy

    torch.cuda.synchronize = lambda *_: None  # the saver's last line; without a GPU there is nothing to wait for
    from converter.integrations import examine_after_save

    # The saver alone: the strategy's own set-up asks for GPUs.
    strategy = object.__new__(DeepspeedStrategy)
    strategy.args = SimpleNamespace(ds=SimpleNamespace(zero_stage=3, tensor_parallel_size=1))
    strategy.stage, strategy.ds_tensor_parallel_size = 3, 1
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=CONFIG)
    for step in range(1, saves + 1):
        torch.manual_seed(10 * step + dist.get_rank())
        tokens = torch.randint(3, 160, (1, 6))
        reward = engine(tokens, attention_mask=torch.ones_like(tokens))
        engine.backward((reward - 1).square().mean())
        engine.step()
        steps[0] = step
        folder = out / "run" / f"step-{step}"
        strategy.save_model(engine, NoTokenizer(), str(folder))
        if not is_examined:
            time.sleep(2)
            continue
        examine_after_save(folder, strict=True)
        if dist.get_rank() != 0 and step == 1:
            return  # rank 0 may have raised; a launcher ends the others


if __name__ == "__main__":
    (work if "--worker" in sys.argv else launch)(Path(sys.argv[1]), sys.argv[2])
