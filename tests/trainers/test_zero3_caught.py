"""Real ZeRO-3 training is stopped at its first broken save: in Trainer, in a plain loop, after OpenRLHF's own saver."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from matrix import installed_here, python_of

from places import REPOSITORY

pytestmark = pytest.mark.trainer

PARAMETERS = 160 * 32 + 2 * (2 * 32 * 32 + 32 + 2 * (32 * 16 + 16) + 3 * 32 * 48 + 2 * 32) + 32 + 32
"""Embedding; of each layer q and o, q's bias, k and v with theirs, the MLP, two norms; the last norm; the head."""


@pytest.fixture
def python(envs: Path) -> Path:
    found = python_of(envs, "openrlhf-zero")
    if not found.exists():
        pytest.skip("openrlhf-zero is not built")
    return found


def trained(python: Path, out: Path, way: str, script: str = "ungathered.py") -> list[dict[str, Any]]:
    """What each rank reported."""
    known = {"PYTHONPATH": installed_here(out / "installed")}
    command = [python, REPOSITORY / "tests" / "runs" / "zero" / script, out, way]
    subprocess.run(command, check=True, env=os.environ | known, timeout=600)
    return [json.loads((out / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


def expect_caught(told: dict[str, Any]) -> None:
    assert told["error"]["code"] == "broken-checkpoint"
    assert "zero3-empty-tensors" in told["error"]["what"]
    assert "torch.Size([0])" in told["error"]["what"]
    assert "stage3_gather_16bit_weights_on_model_save: true" in told["error"]["next"]
    assert (told["steps"], told["parameters"]) == (1, PARAMETERS)


def test_a_trainer_whose_saver_does_not_gather_is_stopped_on_every_rank(python: str, tmp_path: Path) -> None:
    for told in trained(python, tmp_path, "overridden"):
        expect_caught(told)


def test_trainers_own_saver_leaves_whole_shards_and_trains_to_its_end(python: str, tmp_path: Path) -> None:
    """transformers 5 saves DeepSpeed's shards where it may not gather: `gather` makes a model of them."""
    for told in trained(python, tmp_path, "trainer"):
        assert (told["steps"], told["error"]) == (2, None)


def test_a_loop_that_saves_without_gathering_is_stopped_at_its_first_save(python: str, tmp_path: Path) -> None:
    first, other = trained(python, tmp_path, "script")
    expect_caught(first)
    assert other["error"] is None


@pytest.mark.parametrize(
    ("targets", "code"), [("all-linear", "head-base-lost"), ("q_proj,v_proj", "head-missing")], ids=["all", "some"]
)
def test_what_openrlhfs_saver_writes_of_a_lora_reward_model_is_stopped_at_its_first_save(
    python: Path, tmp_path: Path, targets: str, code: str
) -> None:
    """Its LoRA has no `modules_to_save`: the head that it drew at random is in no file of the save."""
    first, other = trained(python, tmp_path, targets, "openrlhf_saver.py")
    assert first["error"]["code"] == "broken-checkpoint"
    assert code in first["error"]["what"]
    assert 'modules_to_save=["score"]' in first["error"]["next"]
    assert first["steps"] == 1
    assert first["parameters"] > PARAMETERS  # the base, LoRA's factors and the head are still in memory
    assert other["error"] is None
