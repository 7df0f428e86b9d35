"""Saves runs with real DeepSpeed, and goes on with them on other numbers of ranks. Needs `deepspeed`.

    python tests/runs/zero/resume.py JOBS --ranks 4

JOBS is a JSON list of {"do": "save" | "resume", "run": FOLDER, "case": NAME, "stage": N, "out": FOLDER}, and
`"universal": true` of a universal checkpoint. All ranks
together see the same batches whatever their number, so that losses of runs on different numbers can be compared.

- `save` trains two steps, saves, writes what lived to `oracle.safetensors`, goes on for five steps and writes their
  losses to `losses.json`, for those who resume.
- `resume` loads the folder, writes what then lives to OUT/oracle.safetensors, goes on for five steps, and writes their
  losses and what else came back to OUT/resumed.json; or what DeepSpeed said to OUT/error.txt.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections import OrderedDict
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
from train import CASES, STEPS, Case, build, describe, optimizer_of, oracle, settings

from ranks import run_jobs

MORE_STEPS = 5
ROWS = 12
"""Rows of a batch of all ranks; 1, 2, 3, 4, 6 and 12 ranks have equal shares of them."""

CLIENT = {"seen": 24, "words": {"a", "b"}, "order": OrderedDict(x=(1, 2.5), y=None), "raw": b"\0\1"}


def cases() -> dict[str, Case]:
    """Those of `train`, and what only matters to those who go on."""
    more = {
        "subgroups-fp32": replace(CASES["subgroups"], dtype="fp32"),
        "roundrobin-fp32": replace(CASES["roundrobin"], dtype="fp32"),
        "aligned-fp32": replace(CASES["aligned"], dtype="fp32"),
        "lm-tied-fp32": replace(CASES["lm-tied"], dtype="fp32"),
        "odd-fp16": replace(CASES["odd"], dtype="fp16"),
        "lora-fp32": replace(CASES["lora"], dtype="fp32"),
    }
    return CASES | more


def work(jobs: Path) -> None:
    """One rank: every job, one after the other."""
    import deepspeed
    import torch
    import torch.distributed as dist

    deepspeed.init_distributed("gloo", verbose=False, timeout=timedelta(seconds=90))
    deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True
    known = deepspeed.accelerator.get_accelerator().supported_dtypes()
    deepspeed.accelerator.get_accelerator().supported_dtypes = lambda: [*known, torch.float16]
    for job in json.loads(jobs.read_text()):
        case = Case(**job["options"]) if "options" in job else cases()[job["case"]]
        out = Path(job["run" if job["do"] == "save" else "out"])
        out.mkdir(parents=True, exist_ok=True)
        try:
            if job["do"] == "save":
                save(out, job["case"], case, job["stage"])
            else:
                resume(Path(job["run"]), out, case, job["stage"], universal=job.get("universal", False))
        except Exception:
            (out / "error.txt").write_text(traceback.format_exc())
            print(f"{out}: rank {dist.get_rank()} failed", flush=True)
            # The others may wait for this rank for ever.
            os._exit(1)


def start(case: Case, stage: int, *, changed: bool, universal: bool = False) -> tuple[Any, Any]:
    """An engine, and its module; changed: with other numbers than those that are going to be loaded."""
    import deepspeed
    import torch

    torch.manual_seed(7 if changed else 1)
    model, _ = build(case.model)
    if changed and case.exclude_frozen:
        # What wasn't saved is what the base model has.
        torch.manual_seed(1)
        same = build(case.model)[0].state_dict()
        model.load_state_dict({n: t for n, t in same.items() if "lora_" not in n}, strict=False)
    if universal:
        # DeepSpeed loads what was trained, and leaves the rest as the model was built.
        torch.manual_seed(1)
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        same = build(case.model)[0].state_dict()
        model.load_state_dict({n: t for n, t in same.items() if n not in trained}, strict=False)
    # What is loaded has to bring its own settings.
    optimizer = optimizer_of(case, model, rate=1.0 if changed else 1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
    config = settings(case, stage) | ({"checkpoint": {"load_universal": True}} if universal else {})
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=scheduler, config=config)
    return engine, model


def steps(engine: Any, case: Case, first: int, count: int) -> list[float]:
    """Train, and return the losses of all ranks together."""
    import torch
    import torch.distributed as dist

    losses = []
    rank, ranks = dist.get_rank(), dist.get_world_size()
    mine = slice(rank * ROWS // ranks, (rank + 1) * ROWS // ranks)
    for step in range(first, first + count):
        torch.manual_seed(100 + step)
        if case.model == "odd":
            rows = torch.randn(ROWS, 5)[mine]
            loss = engine(rows.to(next(engine.module.parameters()).dtype))
        else:
            tokens = torch.randint(1, 28, (ROWS, 7))[mine]
            if case.model in ("lm", "lm-tied", "lora-causal", "neox", "vision", "vision-lora"):
                loss = engine(input_ids=tokens, labels=tokens).loss
            else:
                outputs = engine(input_ids=tokens, attention_mask=torch.ones_like(tokens))
                loss = (outputs.logits.float() - 1).pow(2).mean()
        engine.backward(loss)
        engine.step()
        total = loss.detach().double().clone()
        dist.all_reduce(total)
        losses.append(float(total) / ranks)
    return losses


def save(folder: Path, name: str, case: Case, stage: int) -> None:
    """Two steps, the checkpoint, and five more."""
    import torch.distributed as dist
    from safetensors.torch import save_file

    engine, _ = start(case, stage, changed=False)
    steps(engine, case, 0, STEPS)
    engine.save_checkpoint(
        str(folder), tag=case.tag, client_state=CLIENT, exclude_frozen_parameters=case.exclude_frozen
    )
    found = oracle(engine, case, stage)
    rates = [g["lr"] for g in engine.optimizer.param_groups]
    losses = steps(engine, case, STEPS, MORE_STEPS)
    if dist.get_rank() == 0:
        for script in ("zero_to_fp32.py", "zero_to_torch.py"):
            (folder / script).unlink(missing_ok=True)
        save_file({k: v.clone().contiguous() for k, v in found.items()}, folder / "oracle.safetensors")
        (folder / "losses.json").write_text(json.dumps({"losses": losses, "rates": rates}))
        facts = {"case": name, "stage": stage, "ranks": dist.get_world_size(), **describe(case)}
        (folder / "fixture.json").write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n")
    dist.barrier()
    engine.destroy()


def resume(folder: Path, out: Path, case: Case, stage: int, *, universal: bool = False) -> None:
    """Load, look at what lives, and five steps."""
    import torch.distributed as dist
    from safetensors.torch import save_file

    engine, _ = start(case, stage, changed=True, universal=universal)
    path, client = engine.load_checkpoint(str(folder), load_module_strict=not case.exclude_frozen)
    if path is None:
        raise RuntimeError("DeepSpeed loaded nothing")
    found = oracle(engine, case, stage)
    told = {
        "rates": [g["lr"] for g in engine.optimizer.param_groups],
        "decays": [g["weight_decay"] for g in engine.optimizer.param_groups],
        "steps": engine.global_steps,
        "scheduler": engine.lr_scheduler.last_epoch,
        "client": {k: repr(sorted(client[k]) if k == "words" else client[k]) for k in CLIENT},
        "losses": steps(engine, case, STEPS, MORE_STEPS),
    }
    if dist.get_rank() == 0:
        save_file({k: v.clone().contiguous() for k, v in found.items()}, out / "oracle.safetensors")
        (out / "resumed.json").write_text(json.dumps(told))
    dist.barrier()
    engine.destroy()


if __name__ == "__main__":
    run_jobs(__file__, __doc__, work)
