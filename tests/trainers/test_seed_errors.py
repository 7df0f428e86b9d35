"""The two errors that this tool was begun for, from OpenRLHF's own loader; and gone once a folder was converted."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from cells import inputs
from matrix import PROBES, environment, make_base, python_of
from safetensors.torch import load_file, save_file

from converter.cli import main

pytestmark = [pytest.mark.trainer, pytest.mark.parametrize("version", ["openrlhf", "openrlhf-0.5.5"])]


def load(envs: Path, version: str, folder: Path, role: str) -> dict[str, Any]:
    """What OpenRLHF's loader did with a folder."""
    python, work = python_of(envs, version), folder.parent
    if not python.exists():
        pytest.skip(f"{version} is not built")
    (work / "inputs.json").write_text(json.dumps(inputs()))
    out = work / "report.json"
    command = [python, PROBES / "probe_openrlhf.py", folder, "--role", role, "--inputs", work / "inputs.json"]
    subprocess.run([*command, "--out", out], env=environment(work), check=True, capture_output=True)
    found: dict[str, Any] = json.loads(out.read_text())
    return found


@pytest.fixture
def reward_model(tmp_path: Path) -> Path:
    """A whole reward model, as OpenRLHF before 0.5.4 named its head."""
    base, out = tmp_path / "base", tmp_path / "rm"
    make_base(base)
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(base)
    state = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    state["value_head.weight"] = torch.linspace(-1, 1, 32)[None].clone()
    model.save_pretrained(out, state_dict=state)
    config = json.loads((out / "config.json").read_text()) | {"architectures": ["RewardModel"], "rope_theta": 10000.0}
    (out / "config.json").write_text(json.dumps(config))
    return out


def test_a_head_of_another_name_is_newly_initialized_and_after_conversion_it_is_not(
    envs: Path, version: str, reward_model: Path
) -> None:
    before = load(envs, version, reward_model, "critic")
    said = "\n".join(before["said"])
    if version == "openrlhf-0.5.5":
        assert "Some weights of CriticModel were not initialized from the model checkpoint at" in said
        assert "and are newly initialized: ['score.weight']" in said
    else:
        assert "CriticModel LOAD REPORT" in said
        assert "score.weight" in said and "MISSING" in said
    random = before["head"]["score.weight"]["values"]
    assert random != torch.linspace(-1, 1, 32).double().tolist()

    out = reward_model.parent / "critic"
    to = "openrlhf@0.11.2" if version == "openrlhf" else "openrlhf@0.5.5"
    assert main(["rm-to-critic", str(reward_model), str(out), "--to", to]) == 0
    after = load(envs, version, out, "critic")
    assert not [s for s in after["said"] if "initialized" in s or "LOAD REPORT" in s]
    assert after["head"]["score.weight"]["values"] == torch.linspace(-1, 1, 32).double().tolist()


def test_an_ungathered_tensor_is_a_size_mismatch_and_after_repair_the_folder_loads(
    envs: Path, version: str, reward_model: Path
) -> None:
    whole, broken = reward_model.parent / "whole", reward_model.parent / "broken"
    to = "openrlhf@0.11.2" if version == "openrlhf" else "openrlhf@0.5.5"
    assert main(["convert", str(reward_model), str(whole), "--to", to, "--role", "reward"]) == 0
    broken.mkdir()
    for file in whole.iterdir():
        if file.name != "rlhf-convert.json":
            (broken / file.name).write_bytes(file.read_bytes())
    tensors = load_file(broken / "model.safetensors")
    for name in [n for n in tensors if "proj" in n]:
        tensors[name] = torch.empty(0)
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    before = load(envs, version, broken, "reward")
    told = before["error"]["text"] + "\n".join(before["said"])
    assert "torch.Size([0])" in told
    assert "size mismatch" in told or "mismatch" in told.lower()

    fixed = reward_model.parent / "fixed"
    assert main(["repair", str(broken), str(fixed), "--weights-from", str(whole)]) == 0
    after = load(envs, version, fixed, "reward")
    assert "error" not in after
    assert after["head"]["score.weight"]["values"] == torch.linspace(-1, 1, 32).double().tolist()
    names = [n for n in load_file(whole / "model.safetensors") if "score" not in n]
    assert len(after["backbone"]) == len(names)
