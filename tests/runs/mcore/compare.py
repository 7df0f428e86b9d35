"""What is gathered from a Megatron checkpoint against the model of transformers that was put into it: bit by bit."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from lived import facts, runs_in

RUNS = Path(__file__).parent / "runs"


def run_names(root: Path = RUNS) -> list[str]:
    """Every saved run."""
    return runs_in(root)


def shards(run: Path) -> Path:
    """The folder of its one checkpoint."""
    (found,) = run.glob("iter_*")
    return found


def oracle(run: Path) -> dict[str, torch.Tensor]:
    """What the model was before it was put into Megatron; of a critic with its head in place of the output layer."""
    held = load_file(run / "hf" / "model.safetensors")
    if facts(run)["versions"]["megatron-core"].startswith("0.13.") and facts(run)["dtype"] == "bf16":
        # Later versions make it fp32 again before they save; here it lived as the model was cast.
        held |= {n: t.bfloat16() for n, t in held.items() if n.endswith("e_score_correction_bias")}
    if facts(run)["critic"]:
        held.pop("lm_head.weight", None)
        held |= {f"score.{n}": t for n, t in load_file(run / "head.safetensors").items()}
    return held


def written(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found
