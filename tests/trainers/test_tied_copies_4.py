"""Tied embeddings that are stored twice with different values: transformers 4 uses the input's for both."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from matrix import python_of

from all_families import FAMILIES, input_of, output_of, save_twice
from oracle.bases import quiet

pytestmark = pytest.mark.trainer

OLD = "trl-0.28"
"""An environment with transformers 4.57.6."""

NEWER_FILES = {"qwen3_moe"}
"""What transformers 5 saves of these at this size transformers 4 can't load for another reason."""


@pytest.fixture(scope="module")
def loaded(envs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every family saved with two embeddings, loaded by transformers 4."""
    root = tmp_path_factory.mktemp("copies")
    with quiet():
        for task, kind in FAMILIES:
            save_twice(root / kind, task, kind, equal=False)
            (root / kind / "pair.json").write_text(json.dumps([input_of(kind), output_of(kind)]))
    script = Path(__file__).with_name("load_tied_copies.py")
    subprocess.run([python_of(envs, OLD), script, *(root / k for _, k in FAMILIES)], check=True, capture_output=True)
    return root


@pytest.mark.parametrize("kind", [kind for _, kind in FAMILIES if kind not in NEWER_FILES])
def test_transformers_4_drops_the_output_embedding(kind: str, loaded: Path) -> None:
    assert json.loads((loaded / kind / "said.json").read_text()) == [input_of(kind), input_of(kind)]
