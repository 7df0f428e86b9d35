"""Trains under real ZeRO-3 on two CPU ranks without gathering, and has each save examined as it happens.

    PY tests/runs/zero/ungathered.py OUT WAY

Needs `deepspeed`, `transformers`, `accelerate`. WAY is `trainer` (transformers' Trainer with CheckpointDoctor),
`overridden` (the same, with a `save_model` that saves what rank 0 holds, as training scripts have it) or `script` (a
loop that calls `save_pretrained` on rank 0, as scripts over accelerate do, and then `examine_after_save`).
OUT gets `rank-R.json`: the steps that were done, the error, and the count of parameters that are still in memory.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from ranks import run_ranks

RANKS = 2
SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 160, "pad_token_id": 0, "num_labels": 1,
}  # fmt: skip
ZERO = {"stage": 3, "stage3_gather_16bit_weights_on_model_save": False, "stage3_param_persistence_threshold": 0}


def launch(out: Path, way: str) -> None:
    """Start one process a rank and wait for them."""
    run_ranks(RANKS, __file__, out, way, "--worker", seconds=300)


def work(out: Path, way: str) -> None:
    """One rank."""
    import deepspeed

    from converter.integrations import BrokenCheckpoint

    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("converter.integrations").setLevel(logging.INFO)
    # An operator that is compiled at first use; gloo's own does the same.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", verbose=False)
    model, rows = _model_and_rows()
    steps, error = [0], None
    try:
        if way == "script":
            _script(out, model, rows, steps)
        else:
            _trainer(out, model, rows, steps, overridden=way == "overridden")
    except BrokenCheckpoint as broken:
        error = {"code": broken.code, "what": broken.what, "next": str(broken.next), "where": broken.where}
    held = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
    told = {"steps": steps[0], "error": error, "parameters": held}
    (out / f"rank-{os.environ['RANK']}.json").write_text(json.dumps(told))


def _model_and_rows() -> tuple[Any, list[dict[str, Any]]]:
    import torch
    from transformers import Qwen2Config, Qwen2ForSequenceClassification

    torch.manual_seed(0)
    model = Qwen2ForSequenceClassification(Qwen2Config(**SIZES))
    rows = [{"input_ids": torch.arange(4) + i + 3, "labels": torch.tensor(float(i % 2))} for i in range(16)]
    return model, rows


def _trainer(out: Path, model: Any, rows: list[dict[str, Any]], steps: list[int], *, overridden: bool) -> None:
    from transformers import Trainer, TrainingArguments

    from converter.integrations.transformers import CheckpointDoctor

    config = {"train_micro_batch_size_per_gpu": "auto", "train_batch_size": "auto", "zero_optimization": ZERO}
    arguments = TrainingArguments(
        str(out / "run"), max_steps=2, save_steps=1, per_device_train_batch_size=2, report_to=[], use_cpu=True,
        deepspeed=config | {"zero_force_ds_cpu_optimizer": False}, disable_tqdm=True, optim="adamw_torch",
        save_only_model=True,
    )  # fmt: skip

    class OwnSaver(Trainer):  # type: ignore[misc]
        def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
            if self.args.should_save:
                self.model.save_pretrained(output_dir)

    kind = OwnSaver if overridden else Trainer
    run = kind(model=model, args=arguments, train_dataset=rows, callbacks=[CheckpointDoctor(strict=True)])
    try:
        run.train()
    finally:
        steps[0] = run.state.global_step


def _script(out: Path, model: Any, rows: list[dict[str, Any]], steps: list[int]) -> None:
    import deepspeed
    import torch
    import torch.distributed as dist

    from converter.integrations import examine_after_save

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": ZERO, "zero_force_ds_cpu_optimizer": False}
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    for step in (1, 2):
        row = rows[2 * step + dist.get_rank()]
        loss = engine(input_ids=row["input_ids"][None], labels=row["labels"][None]).loss
        engine.backward(loss)
        engine.step()
        steps[0] = step
        folder = out / "run" / f"step-{step}"
        if dist.get_rank() == 0:
            model.save_pretrained(folder)
        dist.barrier()
        examine_after_save(folder, strict=True)
        if dist.get_rank() != 0 and step == 1:
            return  # rank 0 has raised; a launcher ends the others


if __name__ == "__main__":
    (work if "--worker" in sys.argv else launch)(Path(sys.argv[1]), sys.argv[2])
