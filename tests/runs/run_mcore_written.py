"""Writes every family with `convert --to megatron`, and loads it with real megatron-core on CPU. Slow.

    python tests/runs/run_mcore_written.py OUT --trainer PYTHON   a Python that has megatron-core and transformers
    python tests/runs/run_mcore_written.py OUT --only mixtral     cases whose names have this in them

Without --trainer the environment of `run_mcore_matrix.py` is taken, and built if it isn't there. Each is loaded at
several TP, PP and EP and compared parameter by parameter (`mcore/load.py`), then gathered back and compared with the
model that it was made of. Exits with 1 on a difference. The Python that runs this has rlhf-convert.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from run_mcore_matrix import DEFAULT, HERE, trainer

RANKS: tuple[tuple[int, int, int], ...] = ((1, 1, 1), (2, 2, 1))
"""TP, PP and EP."""
CRITICS = {"qwen3-critic": "qwen3-tied"}
SAVE = """
import sys
from pathlib import Path
sys.path[:0] = [sys.argv[3]]
import torch
from models import built
from transformers import AutoModelForSequenceClassification
model = built(sys.argv[1])
if sys.argv[4] == "critic":
    head = AutoModelForSequenceClassification.from_config(model.config, num_labels=1)
    head.model = model.model
    head.score.weight.data = torch.randn(head.score.weight.shape, generator=torch.Generator().manual_seed(5))
    head.config.architectures = [type(head).__name__]
    head.config.pad_token_id = 0
    model = head
for name, parameter in (*model.named_parameters(), *model.named_buffers()):
    if not name.endswith("e_score_correction_bias"):
        parameter.data = parameter.data.bfloat16()
model.save_pretrained(sys.argv[2])
"""


def check(python: str, out: Path, name: str) -> list[str]:
    """What is wrong with a family that is written, loaded, and gathered again."""
    from mcore.compare import written
    from mcore.models import MODELS
    from oracle.command import run
    from zero.compare import differences

    case = CRITICS.get(name, name)
    role = "critic" if name in CRITICS else "actor"
    model, target, back = out / name / "hf", out / name / "written", out / name / "back"
    subprocess.run([sys.executable, "-c", SAVE, case, str(model), str(HERE / "mcore"), role], check=True)
    done = run("convert", model, target, "--to", "megatron", "--role", role, "--overwrite")
    if done.code:
        return [f"exit {done.code}: {done.err.strip()}"]
    found = []
    experts = any(k in MODELS[case] for k in ("num_experts", "num_local_experts", "n_routed_experts"))
    for tp, pp, ep in (*RANKS, *(((1, 1, 2),) if experts else ())):
        sizes = ["--tp", str(tp), "--pp", str(pp), "--ep", str(ep)]
        command = [python, str(HERE / "mcore" / "load.py"), str(target), "--model", str(model), *sizes]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        if ended.returncode:
            log = out / f"{name}-tp{tp}-pp{pp}-ep{ep}.log"
            log.write_text(ended.stdout + ended.stderr)
            found.append(f"TP {tp}, PP {pp}, EP {ep}: {log}")
    done = run("gather", target, back, "--overwrite")
    return [*found, *([done.err] if done.code else differences(written(back), written(model)))]


def main() -> None:
    """Write, load, gather."""
    from mcore.models import MODELS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--trainer")
    parser.add_argument("--only", default="")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    failed = 0
    for name in (n for n in (*MODELS, *CRITICS) if asked.only in n):
        found = check(asked.trainer or trainer(DEFAULT), asked.out, name)
        failed += bool(found)
        print(f"{name:24} {'; '.join(found[:5]) if found else 'equal'}", flush=True)
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
