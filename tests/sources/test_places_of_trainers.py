"""Runs as trainers lay them out, gathered from their top: every tensor equals the live model's, bit by bit.

The layouts are those of the trainers' own savers:

- NeMo-RL, first generation: `dcp.save({"model": ModelState(model)})` below `step_N/policy/weights`,
  https://github.com/NVIDIA-NeMo/RL/blob/00cb7b5/nemo_rl/utils/native_checkpoint.py
- NeMo-RL, second: pieces of torch's HuggingFaceStorageWriter below `step_N/policy/weights/model`
- slime's FSDP backend: `dcp.save({"app": AppState})` in `iter_N`,
  https://github.com/THUDM/slime/blob/05254ea/slime/backends/fsdp_utils/checkpoint.py, later `iter_N/{model,optimizer}`
- Lightning 2.6: a folder `.ckpt` of DCP with `meta.pt`, or of DeepSpeed with the tag `checkpoint`
- SkyRL: ranks' files as verl's, `latest_ckpt_global_step.txt`, models in `policy` and `critic`,
  https://github.com/NovaSky-AI/SkyRL/blob/10c85ee/skyrl-train/skyrl_train/distributed/fsdp_strategy.py
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict, get_state_dict

from oracle.bases import read_tensors
from oracle.command import run
from places import RUNS
from small_families import tiny

pytestmark = pytest.mark.filterwarnings("ignore")
FAMILIES = ("llama", "qwen2", "gpt_neox")
Lay = Callable[[Path, Any, Any], Path]
"""Saves a model and its optimizer below a run's folder, and gives the folder in which its config.json lies."""


def trained(family: str) -> tuple[Any, Any]:
    """A model after one step, so that its optimizer has moments."""
    torch.manual_seed(0)
    model = tiny(family)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    optimizer.step()
    return model, optimizer


def saved(state: dict[str, Any], folder: Path) -> None:
    dcp.save(state, checkpoint_id=folder, no_dist=True)


def nemo_first(root: Path, model: Any, optimizer: Any) -> Path:
    for step in (5, 10):
        policy = root / f"step_{step}" / "policy"
        (policy / "tokenizer").mkdir(parents=True)
        state = get_model_state_dict(model)
        saved(
            {"model": state if step == 10 else {n: torch.zeros_like(t) for n, t in state.items()}}, policy / "weights"
        )
        saved({"optim": {"optim": get_optimizer_state_dict(model, optimizer)}}, policy / "optimizer")
        (root / f"step_{step}" / "training_info.json").write_text("{}")
        torch.save({}, root / f"step_{step}" / "train_dataloader.pt")
    return root


def nemo_second(root: Path, model: Any, optimizer: Any) -> Path:
    policy = root / "step_10" / "policy"
    weights = policy / "weights" / "model"
    weights.mkdir(parents=True)
    writer = HuggingFaceStorageWriter(path=str(weights), save_distributed=True)
    dcp.save(get_model_state_dict(model), storage_writer=writer, no_dist=True)
    saved({"optim": get_optimizer_state_dict(model, optimizer)}, policy / "optimizer" / "optim")
    return root


def slime_first(root: Path, model: Any, optimizer: Any) -> Path:
    step = root / "iter_0000010"
    weights, moments = get_state_dict(model, optimizer)
    saved({"app": {"model": weights, "optim": moments}}, step)
    torch.save({"torch": torch.get_rng_state()}, step / "rng.pt")
    (step / "meta.json").write_text(json.dumps({"iteration": 10}))
    (root / "latest_checkpointed_iteration.txt").write_text("10")
    return root


def slime_second(root: Path, model: Any, optimizer: Any) -> Path:
    step = root / "iter_0000010"
    saved({"model_state": {"model": get_model_state_dict(model)}}, step / "model")
    saved({"optim_state": {"optim": get_optimizer_state_dict(model, optimizer)}}, step / "optimizer")
    (step / "meta.json").write_text(json.dumps({"iteration": 10}))
    (root / "latest_checkpointed_iteration.txt").write_text("10")
    return root


def lightning(root: Path, model: Any, optimizer: Any) -> Path:
    place = root / "lightning_logs" / "version_0" / "checkpoints" / "epoch=0-step=10.ckpt"
    weights = {f"net.{n}": t for n, t in get_model_state_dict(model).items()}
    moments = get_optimizer_state_dict(model, optimizer)
    saved({"state_dict": weights, "optimizer_0": moments}, place)
    torch.save({"epoch": 0, "global_step": 10, "pytorch-lightning_version": "2.6.0", "loops": {}}, place / "meta.pt")
    return root


LAYOUTS: dict[str, Lay] = {
    "nemo-first": nemo_first,
    "nemo-second": nemo_second,
    "slime-first": slime_first,
    "slime-second": slime_second,
    "lightning": lightning,
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_is_gathered_from_its_top(layout: str, family: str, tmp_path: Path) -> None:
    model, optimizer = trained(family)
    top = tmp_path / "run"
    LAYOUTS[layout](top, model, optimizer)
    tiny(family).save_pretrained(tmp_path / "base")
    tag = ("--tag", "step_10") if layout == "nemo-first" else ()  # NeMo-RL names no step as its last
    done = run("gather", top, tmp_path / "out", "--base", tmp_path / "base", *tag)
    assert done.code == 0, done.text
    model.save_pretrained(tmp_path / "live")
    made, live = read_tensors(tmp_path / "out"), read_tensors(tmp_path / "live")
    assert made.keys() == live.keys()
    assert all(torch.equal(made[name], tensor) for name, tensor in live.items())


def test_the_parts_of_a_step_of_nemo_rl_are_no_models_of_their_own(tmp_path: Path) -> None:
    model, optimizer = trained("llama")
    nemo_first(tmp_path / "run", model, optimizer)
    for below in ("step_10/policy", "step_10"):
        done = run("inspect", tmp_path / "run" / below)
        assert done.code == 0, done.text
        assert "optimizer" not in done.out.partition("Next:")[2]


@pytest.mark.parametrize("part", ["policy", "critic"])
def test_skyrl_s_run_is_gathered_from_its_top_by_its_own_marker(part: str, tmp_path: Path) -> None:
    """SkyRL's ranks' files are verl's: the same torch state, under its own names of folders."""
    stored = {"policy": "actor-fsdp1-n1", "critic": "critic-fsdp2-n4"}
    for step in (4, 8):
        for name, held in stored.items():
            shutil.copytree(RUNS / "verl_saves/runs" / held, tmp_path / "ckpts" / f"global_step_{step}" / name)
        torch.save({"global_step": step}, tmp_path / "ckpts" / f"global_step_{step}" / "trainer_state.pt")
    (tmp_path / "ckpts" / "latest_ckpt_global_step.txt").write_text("8")
    done = run("gather", tmp_path / "ckpts", tmp_path / "out", "--part", part)
    assert done.code == 0, done.text
    assert "global_step_8" in done.text
    held = load_file(RUNS / "verl_saves/runs" / stored[part] / "oracle.safetensors")
    live = {n.removeprefix("live/"): t for n, t in held.items() if n.startswith("live/")}
    made = read_tensors(tmp_path / "out")
    assert made
    assert all(torch.equal(tensor, live[name]) for name, tensor in made.items())


@pytest.mark.parametrize("name", ["reward-z2-n2", "neox-z2-n2", "lm-tied-z3-n2"])
def test_lightning_s_folder_of_deepspeed_is_gathered_from_the_run(name: str, tmp_path: Path) -> None:
    """The strategy hands DeepSpeed the folder `.ckpt` and the tag `checkpoint`."""
    stored = RUNS / "zero/runs" / name
    place = tmp_path / "run" / "lightning_logs" / "version_0" / "checkpoints" / "epoch=0-step=2.ckpt"
    shutil.copytree(next(p for p in stored.iterdir() if p.name.startswith("global_step")), place / "checkpoint")
    (place / "latest").write_text("checkpoint")
    shutil.copy(stored / "config.json", tmp_path / "run")
    done = run("gather", tmp_path / "run", tmp_path / "out")
    assert done.code == 0, done.text
    want = run("gather", stored, tmp_path / "want")
    assert want.code == 0, want.text
    made, expected = read_tensors(tmp_path / "out"), read_tensors(tmp_path / "want")
    assert made.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[n]) for n, tensor in made.items())
