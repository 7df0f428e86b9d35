"""New tokens as earlier releases of PEFT save them, merged and compared with what their live models said."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from matrix import python_of
from safetensors.torch import load_file

import new_tokens
from new_tokens import Cell, cells
from oracle.command import merged
from oracle.expected import load_output, logits, relative_difference

pytestmark = pytest.mark.trainer

ENVIRONMENTS = {"0.13.2": "openrlhf-0.5.5", "0.18.1": "llamafactory"}
"""PEFT releases, and environments that have them."""

CELLS = [(v, c) for v in ENVIRONMENTS for c in cells("llama", "gpt2") if new_tokens.is_made_by(v, c)]


@pytest.fixture(scope="module")
def made(envs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every cell, by both releases."""
    root = tmp_path_factory.mktemp("new-tokens")
    for version, name in ENVIRONMENTS.items():
        script = [python_of(envs, name), new_tokens.__file__, root / version, "llama", "gpt2"]
        subprocess.run(script, check=True, capture_output=True)
    return root


@pytest.mark.parametrize(
    ("version", "cell"), [p for p in CELLS if p[1].is_saved_whole], ids=lambda v: getattr(v, "name", v)
)
def test_a_merged_model_says_what_an_earlier_pefts_live_model_said(version: str, cell: Cell, made: Path) -> None:
    folder = made / version / cell.name
    merged(folder / "adapter", folder / "out", "--base", folder / "base")
    live = load_file(folder / "live.safetensors")
    said = logits(load_output(folder / "out"), {"input_ids": live["ids"]})
    assert relative_difference(said, live["logits"].to(torch.float64)) < 1e-2
