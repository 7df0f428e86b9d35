"""`converter.load` fills OpenRLHF's critic as its own loader fills it from the folder that a conversion wrote."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from matrix import environment, installed_here, python_of

from converter.cli import main
from converter.shipped import shipped

pytestmark = pytest.mark.trainer

FIXTURES = shipped("fixtures")
BASE, ADAPTER = FIXTURES / "tiny-qwen2-base", FIXTURES / "tiny-reward-adapter"
RUN = FIXTURES / "tiny-reward-run" / "checkpoint-4" / "global_step4"


def loaded(envs: Path, home: Path, critic: Path, base: Path | str, *sources: Path) -> list[dict[str, Any]]:
    """What `load_critic.py` found in the trainer's Python, which knows our plug-ins by the metadata of this install."""
    python = python_of(envs, "openrlhf")
    if not python.exists():
        pytest.skip("openrlhf is not built")
    command = [str(python), str(Path(__file__).with_name("load_critic.py")), *map(str, (critic, base, *sources))]
    known = environment(home) | {"PYTHONPATH": installed_here(home / "installed")}
    done = subprocess.run(command, env=known, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def expect_the_same(found: dict[str, Any]) -> None:
    assert found["class"] == "CriticModel"
    assert found["finite"]
    assert found["differed"]
    assert (found["unequal"], found["missing"], found["unexpected"]) == ([], [], [])
    assert found["names"]
    assert found["values"]
    assert found["filled"] == found["parameters"] > 20


def test_a_model_an_adapter_and_a_run_fill_a_critic_with_the_values_of_the_converted_folder(
    envs: Path, tmp_path: Path
) -> None:
    rm, critic, gathered = tmp_path / "rm", tmp_path / "critic", tmp_path / "critic-of-run"
    assert main(["merge-lora", str(ADAPTER), str(rm), "--base", str(BASE), "-q"]) == 0
    assert main(["rm-to-critic", str(rm), str(critic), "--to", "openrlhf", "-q"]) == 0
    assert main(["rm-to-critic", str(RUN), str(gathered), "--to", "openrlhf", "--base", str(BASE), "-q"]) == 0
    for found in (
        *loaded(envs, tmp_path / "1", critic, "", rm),
        *loaded(envs, tmp_path / "2", critic, BASE, ADAPTER),
        *loaded(envs, tmp_path / "3", gathered, BASE, RUN),
    ):
        expect_the_same(found)


def test_peak_memory_is_the_critic_and_one_tensor(envs: Path, tmp_path: Path) -> None:
    from transformers import Qwen2Config, Qwen2ForSequenceClassification

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=512, hidden_size=1024, intermediate_size=4096, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=8, num_labels=1, pad_token_id=0,
    )  # fmt: skip
    rm, critic = tmp_path / "rm", tmp_path / "critic"
    Qwen2ForSequenceClassification(config).to(torch.bfloat16).save_pretrained(rm)
    assert main(["rm-to-critic", str(rm), str(critic), "--to", "openrlhf", "-q"]) == 0
    once, again = loaded(envs, tmp_path / "home", critic, "", rm, rm)  # what is imported once is not part of the cost
    expect_the_same(once)
    expect_the_same(again)
    assert again["size"] > 20 * again["largest"]
    assert again["grew"] <= 2 * again["largest"], again
