"""Breakages of what trainers saved themselves: DeepSpeed's, torch's and verl's shards."""

from __future__ import annotations

import json
import os
import pickle  # noqa: TID251
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from breakages.sound import Breakage, only
from megatron_ranks import edit_rank
from places import RUNS as SAVED
from shards import edit

Change = Callable[[Path], object]
Z3, Z2, DCP, VERL = (
    "zero/runs/lm-tied-z3-n2",
    "zero/runs/reward-z2-n2",
    "dcp/runs/nested-n4",
    "verl_saves/runs/critic-fsdp1-n3",
)
MEGATRON, OLD_MEGATRON = "mcore/runs/llama-layers-pp2", "mcore/runs/old-qwen2-tp2-pp2"
UNIVERSAL = "zero/universal_runs/lora-z3-n2"


def gone(pattern: str, at: int = 0) -> Change:
    return lambda f: only(f, pattern, at).unlink()


def stray(name: str) -> Change:
    return lambda f: (only(f, "*model_states.pt").parent / name).write_bytes(b"")


def mixed(folder: Path) -> None:
    other = only(SAVED / "zero" / "runs" / "reward-z2-n2", "*mp_rank_00_model_states.pt")
    shutil.copyfile(other, only(folder, "zero_pp_rank_0*model_states.pt").parent / "mp_rank_00_model_states.pt")


def other_sizes(folder: Path) -> None:
    for rank, path in enumerate(sorted(folder.rglob("*optim_states.pt"))):
        shutil.copyfile(only(SAVED / "zero/runs/lora-z3-n2", f"*rank_{rank}*optim_states.pt"), path)


def states(key: str, value: float) -> Change:
    """Puts a number into all that the optimizer has of one key."""

    def change(folder: Path) -> None:
        for path in sorted(folder.rglob("*optim_states.pt")):
            edit(path, lambda s: [g[key].fill_(value) for g in _states(s)] and None)

    return change


def _states(file: Any) -> list[Any]:
    return list(file["optimizer_state_dict"]["optimizer_state_dict"]["state"].values())


def two_worlds(folder: Path) -> None:
    file = only(folder, "model_world_size_3_rank_0.pt")
    shutil.copyfile(file, file.with_name("model_world_size_5_rank_0.pt"))
    only(folder, "fsdp_config.json").unlink()


def deleted(folder: Path) -> None:
    shutil.rmtree(folder / "global_step2")


def metadata(folder: Path, change: Callable[[Any], object]) -> None:
    """Change torch's `.metadata` with torch's own classes."""
    path = only(folder, ".metadata")
    value = pickle.loads(path.read_bytes())
    change(value)
    path.write_bytes(pickle.dumps(value, protocol=2))


def twins(value: Any) -> None:
    paths = value.planner_data
    for key in [k for k in paths if k.startswith("model.")]:
        new = key.replace("model.", "actor." if "0." in key else "critic.", 1)
        paths[new] = (new.partition(".")[0], paths.pop(key)[1])
        value.state_dict_metadata[new] = value.state_dict_metadata.pop(key)


def without_model(value: Any) -> None:
    value.state_dict_metadata.clear()
    value.planner_data.clear()
    value.storage_data.clear()


def compressed(value: Any) -> None:
    next(iter(value.storage_data.values())).transform_descriptors = ["stream.zstd/1"]


def swapped(folder: Path) -> None:
    """One node's file under another's name, both of one save and of one size."""
    shutil.copyfile(only(folder, "__2_0.distcp"), only(folder, "__1_0.distcp"))


def rank_state(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a verl rank's file with torch itself."""
    path = only(folder, "model_world_size_3_rank_1.pt")
    state = torch.load(path, weights_only=False)  # noqa: TID251
    torch.save(change(state) or state, path)


def cut_piece(state: dict[str, Any]) -> None:
    from torch.distributed.tensor import DTensor

    old = state["model.norm.weight"]
    state["model.norm.weight"] = DTensor(old.to_local()[:-1].clone(), old._spec, requires_grad=False)


def placed_twice(state: dict[str, Any]) -> None:
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._dtensor_spec import DTensorSpec
    from torch.distributed.tensor.placement_types import Partial

    old = state["score.weight"]
    spec = DTensorSpec(old._spec.mesh, (Partial(),), old._spec.tensor_meta)
    state["score.weight"] = DTensor(old.to_local(), spec, requires_grad=False)


def as_verl(folder: Path, *parts: str, tracker: str = "") -> None:
    """A run's folder as verl lays it out, with parts of a trainer and its tracker."""
    step = folder.parent / "other" / "global_step_9"
    for part in parts:
        shutil.copytree(folder, step / part)
    shutil.rmtree(folder)
    os.rename(folder.parent / "other", folder)
    if tracker:
        (folder / "latest_checkpointed_iteration.txt").write_text(tracker)


def saved_as(backend: str) -> Change:
    def change(folder: Path) -> None:
        only(folder, "metadata.json").write_text(json.dumps({"sharded_backend": backend}))

    return change


def old_rank(folder: Path, change: Callable[[Any], object]) -> None:
    """Change the file of one rank in Megatron's old format."""
    edit_rank(folder / "iter_0000010", "01_000", change)


def other_norm(state: dict[str, Any]) -> None:
    state["model"]["decoder.layers.0.input_layernorm.weight"] += 1


def with_others(folder: Path) -> None:
    for path in (SAVED / "verl_saves/runs/critic-fsdp2-n4").glob("model_world_size_*"):
        shutil.copy(path, folder)


def left_over(folder: Path) -> None:
    """A rank's file of an earlier run on more ranks."""
    file = only(folder, "*rank_1_*optim_states.pt")
    shutil.copyfile(file, file.with_name(file.name.replace("rank_1", "rank_7")))


def offloaded(folder: Path) -> None:
    """The optimizer on NVMe: its swap files where the shards of it would be."""
    (folder / "offloaded_tensors" / "rank00").mkdir(parents=True)
    (folder / "offloaded_tensors" / "rank00" / "x.swp").write_bytes(b"")
    for path in folder.glob("*optim_states.pt"):
        path.unlink()


RUNS: dict[str, Breakage] = {
    "training-state": Breakage(Z3, lambda f: None, "fixed"),
    "training-state-z2": Breakage(Z2, lambda f: None, "fixed"),
    "training-state-dcp": Breakage("dcp/runs/accelerate-n2", lambda f: None, "fixed"),
    "training-state-verl": Breakage(VERL, lambda f: None, "fixed"),
    "training-state-lora": Breakage("zero/runs/lora-z3-n2", lambda f: None, "fixed"),
    "zero-latest": Breakage(Z3, lambda f: (f / "latest").write_text("global_step99"), "fixed"),
    "zero-model-file": Breakage(Z2, gone("*model_states.pt"), "advice"),
    "zero-rank-missing": Breakage(Z3, gone("*rank_1_*optim_states.pt"), "advice"),
    "zero-mixed": Breakage(Z3, mixed, "advice"),
    "zero-experts": Breakage(Z2, stray("expert_0_mp_rank_00_model_states.pt"), "advice"),
    "zero-pipeline": Breakage(Z2, stray("layer_00-model_01-model_states.pt"), "advice"),
    "zero-tensor-parallel": Breakage(Z2, stray("mp_rank_01_model_states.pt"), "advice"),
    "moments-nonfinite": Breakage(Z3, states("exp_avg", float("nan")), "advice", ("--deep",)),
    "moments-zero": Breakage(Z3, states("exp_avg_sq", 0.0), "advice", ("--deep",)),
    "moments-older": Breakage(Z3, states("step", 1.0), "advice", ("--deep",)),
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
    "dcp-optimizer-alone": Breakage("dcp/runs/accelerate-n2", lambda f: None, "advice", at="checkpoint-2/optimizer_0"),
    "verl-rank-missing": Breakage(VERL, gone("model_world_size_3_rank_1.pt"), "advice"),
    "verl-mixed": Breakage(VERL, two_worlds, "advice"),
    "optimizer-damaged": Breakage(VERL, gone("optim_world_size_3_rank_1.pt"), "advice"),
    "weights-missing-verl": Breakage("verl_saves/runs/actor-fsdp1-n1", lambda f: None, "fixed", at="huggingface"),
    "zero3-empty-tensors-run": Breakage("repair/runs/reward", lambda f: None, "fixed", at="checkpoint-2"),
    "sole-copy": Breakage("repair/runs/reward", lambda f: None, "told", at="checkpoint-2"),
    "zero3-empty-tensors-lora": Breakage(
        "repair/runs/lora", lambda f: None, "fixed", ("--base", "{folder}/../base"), at="checkpoint-2"
    ),
    "head-base-lost-run": Breakage("repair/runs/head", lambda f: None, "fixed", at="checkpoint-2"),
    "shards-deleted-lost": Breakage(
        "repair/runs/reward", lambda f: shutil.rmtree(f / "checkpoint-2" / "global_step2"), "lost", at="checkpoint-2"
    ),
    "run-folder": Breakage("repair/runs/reward", lambda f: None, "told"),
    "megatron-rank-missing": Breakage(
        OLD_MEGATRON, lambda f: shutil.rmtree(only(f, "mp_rank_01_000")), "advice", at="iter_0000010"
    ),
    "megatron-mixed": Breakage(
        OLD_MEGATRON, lambda f: old_rank(f, lambda s: setattr(s["args"], "num_layers", 4)), "advice", at="iter_0000010"
    ),
    "megatron-copies": Breakage(OLD_MEGATRON, lambda f: old_rank(f, other_norm), "advice", at="iter_0000010"),
    "megatron-malformed": Breakage(
        OLD_MEGATRON, lambda f: old_rank(f, lambda s: s.pop("model")), "advice", at="iter_0000010"
    ),
    "dcp-chunks": Breakage(
        "dcp/runs/odd-n3",
        lambda f: metadata(f, lambda m: m.state_dict_metadata["f32.matrix.0"].chunks.pop(1)),
        "advice",
    ),
    "dcp-several-models": Breakage(DCP, lambda f: metadata(f, twins), "advice"),
    "dcp-no-model": Breakage(DCP, lambda f: metadata(f, without_model), "advice"),
    "dcp-transformed": Breakage("dcp/runs/odd-n3", lambda f: metadata(f, compressed), "advice"),
    "dcp-record": Breakage("dcp/runs/odd-n3", swapped, "advice"),
    "verl-sizes": Breakage(VERL, lambda f: rank_state(f, cut_piece), "advice"),
    "verl-malformed": Breakage(VERL, lambda f: rank_state(f, lambda s: [1]), "advice"),
    "verl-placement": Breakage(VERL, lambda f: rank_state(f, placed_twice), "advice"),
    "verl-note": Breakage(VERL, with_others, "told"),
    "verl-latest": Breakage(VERL, lambda f: as_verl(f, "critic", tracker="11"), "fixed"),
    "several-parts": Breakage(VERL, lambda f: as_verl(f, "actor", "critic", tracker="9"), "fixed"),
    "megatron-backend": Breakage(MEGATRON, saved_as("fsdp_dtensor"), "advice", at="iter_0000010"),
    "megatron-note": Breakage(MEGATRON, lambda f: None, "told", at="iter_0000010"),
    "megatron-unfinished": Breakage(MEGATRON, gone("metadata.json"), "advice", at="iter_0000010"),
    "zero-offloaded": Breakage(Z3, lambda f: offloaded(f / "global_step2"), "advice", at="global_step2"),
    "zero-note": Breakage(Z3, left_over, "told"),
}
