"""Loads ranks' files with verl's own checkpoint manager on as many ranks, and says whether what lived lives again.

    python tests/runs/verl_saves/resume.py JOBS --ranks 3

JOBS is a JSON list of {"run": FOLDER, "case": NAME, "fsdp": 1 | 2, "out": FILE}: FOLDER holds the ranks' files, the
oracle of the run that saved them is compared with what is live after loading, and OUT gets the differences. Then it
trains two steps. The environment is that of `train`.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
from train import CASES, Case, Stubs, build, oracle, wrap

from ranks import run_jobs


def work(jobs: Path) -> None:
    """One rank: every job, one after the other; what fails on one rank ends all."""
    import torch.distributed as dist

    sys.meta_path.append(Stubs())  # type: ignore[arg-type]
    dist.init_process_group("gloo")
    for job in json.loads(jobs.read_text()):
        try:
            found = resume(Path(job["run"]), CASES[job["case"]], job["fsdp"], Path(job["oracle"]))
        except Exception:
            Path(job["out"]).write_text(json.dumps([traceback.format_exc()]))
            os._exit(1)
        if dist.get_rank() == 0:
            Path(job["out"]).write_text(json.dumps(found))
        dist.barrier()
    dist.destroy_process_group()


def resume(folder: Path, case: Case, version: int, expected: Path) -> list[str]:
    """Names of what differs after loading."""
    import torch
    import torch.distributed as dist
    from omegaconf import OmegaConf
    from safetensors.torch import load_file
    from verl.utils.checkpoint.fsdp_checkpoint_manager import FSDPCheckpointManager

    torch.manual_seed(7)
    plain, loss = build(case.model)
    plain = plain.to(torch.bfloat16 if case.dtype == "bf16" else torch.float32)
    lived = load_file(expected)
    if not any(folder.glob("optim_*")):
        lived = {n: t for n, t in lived.items() if n.startswith("live/")}
    if case.lora_only:  # the base is not in the files: it is loaded as always
        state = {n: lived[f"live/{n}"] for n in plain.state_dict() if "lora_" not in n and f"live/{n}" in lived}
        plain.load_state_dict(state, strict=False)
    model = wrap(plain, case, version, dist.get_world_size())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0)
    contents = ["model"] + (["optimizer"] if any(folder.glob("optim_*")) else [])
    contents += ["extra"] if any(folder.glob("extra_*")) else []
    asked = OmegaConf.create({"save_contents": ["model"], "load_contents": contents})
    manager = FSDPCheckpointManager(model, optimizer, processing_class=None, checkpoint_config=asked)
    manager.load_checkpoint(str(folder))
    found = oracle(model, optimizer, version, case.original)
    wrong = sorted(found.keys() ^ lived.keys())
    wrong += [n for n, t in found.items() if n in lived and not same(t, lived[n])]
    for step in range(2):
        torch.manual_seed(step)
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(model)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        if not torch.isfinite(value):
            wrong.append(f"loss of step {step}: {float(value)}")
    return wrong + [f"rate {g['lr']}" for g in optimizer.param_groups if "optimizer" in contents and g["lr"] != 1e-2]


def same(one: Any, other: Any) -> bool:
    """Bit by bit, but for the sign of nothing: no value here is NaN."""
    import torch

    return one.dtype == other.dtype and torch.equal(one, other)


if __name__ == "__main__":
    run_jobs(__file__, __doc__, work)
