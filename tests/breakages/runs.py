"""Breakages of what trainers saved themselves: DeepSpeed's, torch's and verl's shards."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from breakages.sound import TESTS, Breakage, only

Change = Callable[[Path], object]
Z3, Z2, DCP, VERL = (
    "zero/runs/lm-tied-z3-n2",
    "zero/runs/reward-z2-n2",
    "dcp/runs/nested-n4",
    "verl_saves/runs/critic-fsdp1-n3",
)
UNIVERSAL = "zero/universal_runs/lora-z3-n2"


def gone(pattern: str, at: int = 0) -> Change:
    return lambda f: only(f, pattern, at).unlink()


def stray(name: str) -> Change:
    return lambda f: (only(f, "*model_states.pt").parent / name).write_bytes(b"")


def mixed(folder: Path) -> None:
    other = only(TESTS / "zero" / "runs" / "reward-z2-n2", "*mp_rank_00_model_states.pt")
    shutil.copyfile(other, only(folder, "zero_pp_rank_0*model_states.pt").parent / "mp_rank_00_model_states.pt")


def other_sizes(folder: Path) -> None:
    for rank, path in enumerate(sorted(folder.rglob("*optim_states.pt"))):
        shutil.copyfile(only(TESTS / "zero/runs/lora-z3-n2", f"*rank_{rank}*optim_states.pt"), path)


def two_worlds(folder: Path) -> None:
    file = only(folder, "model_world_size_3_rank_0.pt")
    shutil.copyfile(file, file.with_name("model_world_size_5_rank_0.pt"))
    only(folder, "fsdp_config.json").unlink()


def deleted(folder: Path) -> None:
    shutil.rmtree(folder / "global_step2")


RUNS: dict[str, Breakage] = {
    "training-state": Breakage(Z3, lambda f: None, "mended"),
    "training-state-z2": Breakage(Z2, lambda f: None, "mended"),
    "training-state-dcp": Breakage("dcp/runs/accelerate-n2", lambda f: None, "mended"),
    "training-state-verl": Breakage(VERL, lambda f: None, "mended"),
    "training-state-lora": Breakage("zero/runs/lora-z3-n2", lambda f: None, "mended"),
    "zero-latest": Breakage(Z3, lambda f: (f / "latest").write_text("global_step99"), "mended"),
    "zero-model-file": Breakage(Z2, gone("*model_states.pt"), "advice"),
    "zero-rank-missing": Breakage(Z3, gone("*rank_1_*optim_states.pt"), "advice"),
    "zero-mixed": Breakage(Z3, mixed, "advice"),
    "zero-experts": Breakage(Z2, stray("expert_0_mp_rank_00_model_states.pt"), "advice"),
    "zero-pipeline": Breakage(Z2, stray("layer_00-model_00-model_states.pt"), "advice"),
    "zero-tensor-parallel": Breakage(Z2, stray("mp_rank_01_model_states.pt"), "advice"),
    "zero-sizes": Breakage(Z3, other_sizes, "advice"),
    "zero-malformed": Breakage(
        Z3, lambda f: shutil.copyfile(only(f, "*rank_0*model_states.pt"), only(f, "*rank_0*optim_states.pt")), "advice"
    ),
    "zero-parameter-missing": Breakage(UNIVERSAL, lambda f: shutil.rmtree(only(f, "*q_proj.lora_A*")), "advice"),
    "dcp-metadata-missing": Breakage(DCP, gone(".metadata"), "advice"),
    "dcp-file-missing": Breakage(DCP, gone("__1_0.distcp"), "advice"),
    "dcp-rank-metadata": Breakage(
        DCP, lambda f: os.rename(only(f, ".metadata"), only(f, ".metadata").with_name("__0.metadata")), "advice"
    ),
    "dcp-malformed": Breakage(DCP, lambda f: only(f, ".metadata").write_bytes(b"\x80\x02}."), "advice"),
    "dcp-hf-shards": Breakage("dcp/runs/hf-shards-n2", lambda f: None, "advice"),
    "dcp-optimizer-alone": Breakage("dcp/runs/accelerate-n2", lambda f: None, "advice", at="checkpoint-2/optimizer_0"),
    "verl-rank-missing": Breakage(VERL, gone("model_world_size_3_rank_1.pt"), "advice"),
    "verl-mixed": Breakage(VERL, two_worlds, "advice"),
    "weights-missing-verl": Breakage("verl_saves/runs/actor-fsdp1-n1", lambda f: None, "mended", at="huggingface"),
    "zero3-empty-tensors-run": Breakage("repair/runs/reward", lambda f: None, "mended", at="checkpoint-2"),
    "sole-copy": Breakage("repair/runs/reward", lambda f: None, "told", at="checkpoint-2"),
    "zero3-empty-tensors-lora": Breakage(
        "repair/runs/lora", lambda f: None, "mended", ("--base", "{folder}/../base"), at="checkpoint-2"
    ),
    "head-base-lost-run": Breakage("repair/runs/head", lambda f: None, "mended", at="checkpoint-2"),
    "shards-deleted-lost": Breakage(
        "repair/runs/reward", lambda f: shutil.rmtree(f / "checkpoint-2" / "global_step2"), "lost", at="checkpoint-2"
    ),
    "run-folder": Breakage("repair/runs/reward", lambda f: None, "told"),
    "megatron": Breakage(
        Z2,
        lambda f: (
            (f / "config.json").unlink(),
            only(f, "oracle.safetensors").unlink(),
            shutil.rmtree(f / "global_step2"),
            (f / "latest").unlink(),
            (f / "iter_0000001" / "mp_rank_00").mkdir(parents=True),
            (f / "iter_0000001" / "mp_rank_00" / "model_optim_rng.pt").write_bytes(b""),
            (f / "latest_checkpointed_iteration.txt").write_text("1"),
        ),
        "advice",
        at="iter_0000001",
    ),
}
