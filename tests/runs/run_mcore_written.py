"""Writes every family with `convert --to megatron`, in both formats, and loads it with real megatron-core on CPU. Slow.

    python tests/runs/run_mcore_written.py OUT --trainer PYTHON   a Python that has megatron-core and transformers
    python tests/runs/run_mcore_written.py OUT --only mixtral qwen3_moe

Without --trainer the environment of `run_mcore_matrix.py` is taken, and built if it isn't there. Each is loaded at
several TP, PP and EP and compared parameter by parameter (`mcore/load.py`), then gathered back and compared with the
model that it was made of. Exits with 1 on a difference. The Python that runs this has rlhf-convert.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from run_mcore_matrix import DEFAULT, HERE, trainer

RANKS: tuple[tuple[int, int, int], ...] = ((1, 1, 1), (2, 1, 1), (1, 2, 1), (2, 2, 1))
"""TP, PP and EP."""
OF_EXPERTS = (1, 1, 2)
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


def prepare(out: Path, name: str) -> tuple[list[str], dict[str, list[str]]]:
    """What is wrong with a family that is written and gathered again, and the loads of it that are left to do."""
    from mcore.compare import written
    from mcore.models import MODELS
    from oracle.command import run
    from zero.compare import differences

    case = CRITICS.get(name, name)
    role = "critic" if name in CRITICS else "actor"
    model = out / name / "hf"
    subprocess.run([sys.executable, "-c", SAVE, case, str(model), str(HERE / "mcore"), role], check=True)
    has_experts = any(k in MODELS[case] for k in ("num_experts", "num_local_experts", "n_routed_experts"))
    found: list[str] = []
    loads: dict[str, list[str]] = {}
    sizes = (*RANKS, *((OF_EXPERTS,) if has_experts else ()))
    for tp, pp, ep in sizes:
        words = ["--tp", str(tp), "--pp", str(pp), "--ep", str(ep)]
        old = out / name / f"old-tp{tp}-pp{pp}-ep{ep}"
        targets = {out / name / "new": [], old: ["--layout", "legacy", "--modules", "local", "--etp", "1", *words]}
        for target, more in targets.items():
            if not more and target.exists():
                continue
            if more and has_experts and tp > 1 and ep == 1:
                more[more.index("--etp") + 1] = str(tp)  # as Megatron splits experts where EP is 1
            done = run("convert", model, target, "--to", "megatron", "--role", role, "--overwrite", *more)
            if done.code:
                return [f"exit {done.code}: {done.err.strip()}"], {}
            back = out / name / "back"
            done = run("gather", target, back, "--overwrite")
            found += [done.err] if done.code else differences(written(back), written(model))
        for target in targets:
            loads[f"{name}-{target.name}-tp{tp}-pp{pp}-ep{ep}"] = [str(target), "--model", str(model), *words]
    return found, loads


def main() -> None:
    """Write, gather, load: all loads are of one start of four ranks."""
    from mcore.models import MODELS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--trainer")
    parser.add_argument("--only", nargs="*", default=[])
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    every: dict[str, list[str]] = {}
    is_wrong = False
    for name in (n for n in (*MODELS, *CRITICS) if not asked.only or n in asked.only):
        found, loads = prepare(asked.out, name)
        every |= loads
        is_wrong |= bool(found)
        print(f"{name:32} {'; '.join(found[:5]) if found else 'comes back equal'}", flush=True)
    many = asked.out / "loads.json"
    many.write_text(json.dumps(every))
    for mark in asked.out.glob("*.loaded"):
        mark.unlink()
    python = asked.trainer or trainer(DEFAULT)
    command = [python, str(HERE / "mcore" / "load.py"), str(asked.out), "--many", str(many)]
    with (asked.out / "load.log").open("w") as log:
        subprocess.run(command, stdout=log, stderr=log, check=False)
    for name in every:
        is_equal = (asked.out / f"{name}.loaded").is_file()
        is_wrong |= not is_equal
        print(f"{name:32} {'loaded, equal' if is_equal else 'NOT LOADED: load.log'}", flush=True)
    raise SystemExit(1 if is_wrong else 0)


if __name__ == "__main__":
    main()
