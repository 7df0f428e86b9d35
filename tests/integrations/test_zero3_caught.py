"""Real ZeRO-3 training without gathering is stopped at its first save, by Trainer's callback and in a plain loop.

It needs DeepSpeed: `RLHF_CONVERT_DEEPSPEED_PYTHON` names a Python that has it and this package.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from places import REPOSITORY

pytestmark = pytest.mark.trainer

PARAMETERS = 160 * 32 + 2 * (2 * 32 * 32 + 32 + 2 * (32 * 16 + 16) + 3 * 32 * 48 + 2 * 32) + 32 + 32
"""Embedding; of each layer q and o, q's bias, k and v with theirs, the MLP, two norms; the last norm; the head."""


@pytest.fixture(scope="module")
def python() -> str:
    named = os.environ.get("RLHF_CONVERT_DEEPSPEED_PYTHON")
    if named is None and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("no DeepSpeed")
    return named or sys.executable


def trained(python: str, out: Path, way: str) -> list[dict[str, Any]]:
    """What each rank reported."""
    script = REPOSITORY / "tests" / "runs" / "zero" / "ungathered.py"
    subprocess.run([python, script, out, way], check=True, env=os.environ | {"PYTHONPATH": str(REPOSITORY)})
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
