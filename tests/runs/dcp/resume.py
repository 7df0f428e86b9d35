"""Loads accelerate's checkpoints under FSDP with accelerate, and says whether what lived lives again.

    python tests/runs/dcp/resume.py JOBS --ranks 3

JOBS is a JSON list of {"run": FOLDER, "case": NAME, "layout": "full" | "sharded", "oracle": FILE, "out": FILE}: FOLDER
is what `load_state` would be given, NAME a case of `train`, whose model and wrapping it was; OUT gets the differences.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
from living import live, live_fsdp1
from train import CASES, prepared, steps

from ranks import run_jobs


def work(jobs: Path) -> None:
    """One rank: every job, one after the other; what fails on one rank ends all."""
    import torch
    import torch.distributed as dist

    os.environ["ACCELERATE_USE_CPU"] = "true"
    warnings.filterwarnings("ignore")
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    for job in json.loads(jobs.read_text()):
        try:
            found = resume(job)
        except Exception:
            Path(job["out"]).write_text(json.dumps([traceback.format_exc()]))
            os._exit(1)
        if dist.get_rank() == 0:
            Path(job["out"]).write_text(json.dumps(found))
        dist.barrier()
    dist.destroy_process_group()


def resume(job: dict[str, Any]) -> list[str]:
    """Names of what differs after loading; then two steps are trained."""
    import torch
    from accelerate.utils import load_fsdp_model, load_fsdp_optimizer
    from safetensors.torch import load_file

    case = CASES[job["case"]]
    torch.manual_seed(7)
    plugin, accelerator, model, optimizer, loss, _ = prepared(case, job["layout"], lr=1.0)
    use_dcp = job["layout"] != "ranks"
    load_fsdp_model(plugin, accelerator, model, job["run"], use_dcp=use_dcp)
    load_fsdp_optimizer(plugin, accelerator, optimizer, model, job["run"], use_dcp=use_dcp)
    found = live_fsdp1(model, optimizer) if case.fsdp == 1 else live(model, optimizer.optimizer)
    lived = load_file(job["oracle"])
    wrong = sorted(found.keys() ^ lived.keys())
    wrong += [
        n for n, t in found.items() if n in lived and not (t.dtype == lived[n].dtype and torch.equal(t, lived[n]))
    ]
    wrong += [f"rate {g['lr']}" for g in optimizer.param_groups if g["lr"] != 1e-2]
    steps(model, loss, optimizer, 2, accelerator.backward)
    accelerator.free_memory()
    accelerator.state._reset_state(reset_partial_state=True)
    return wrong


if __name__ == "__main__":
    run_jobs(__file__, __doc__, work)
