"""`verify --live` with each trainer: what it loads is what the folder holds; a folder of another dialect fails."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from cells import TARGETS, Target
from matrix import make_base, python_of

from converter.cli import main

pytestmark = pytest.mark.trainer


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sequence classifier with a causal base beside it."""
    from transformers import LlamaForSequenceClassification

    folder = tmp_path_factory.mktemp("live")
    make_base(folder / "base")
    model = LlamaForSequenceClassification.from_pretrained(folder / "base", num_labels=1)
    with torch.no_grad():
        model.score.weight.copy_(torch.linspace(-1, 1, 32)[None])
    model.save_pretrained(folder / "rm")
    for file in (folder / "base").glob("*token*"):
        (folder / "rm" / file.name).write_bytes(file.read_bytes())
    return folder / "rm"


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.name)
def test_a_converted_folder_is_verified_live(
    envs: Path, target: Target, reward_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    python = python_of(envs, target.environment)
    if not python.exists():
        pytest.skip(f"{target.environment} is not built")
    out = str(tmp_path / "out")
    base = ["--base", str(reward_model.parent / "base")] if target.lm_head else []
    assert main(["convert", str(reward_model), out, "--to", target.to, "--role", target.role, "-q", *base]) == 0
    capsys.readouterr()
    asked = ["verify", out, "--for", target.to, "--role", target.role, "--against", str(reward_model)]
    code = main([*asked, "--live", "--python", str(python), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert code == 0, [c for c in found["checks"] if c["outcome"] == "fails"]
    assert any(c["label"] == "live" and "head equal" in c["text"] for c in found["checks"])
    numbers = "values" if target.role == "critic" else "rewards"
    assert any(c["label"] == "live" and numbers in c["text"] for c in found["checks"])
