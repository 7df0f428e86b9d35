"""Adapters as trainers save them are merged into what their live models said, or refused for what they lost."""

from __future__ import annotations

from pathlib import Path

import pytest
from judge_saved_adapters import TRAINERS, expected, judged, save
from matrix import python_of

import converter

pytestmark = pytest.mark.trainer


@pytest.fixture(scope="module", params=TRAINERS)
def saved(request: pytest.FixtureRequest, envs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a trainer saved: its cases' folders."""
    if not python_of(envs, request.param).exists():
        pytest.skip(f"{request.param} is not built")
    out = tmp_path_factory.mktemp("saved") / request.param
    save(request.param, envs, out, tmp_path_factory.mktemp("home"))
    return out


def test_each_is_merged_into_what_its_live_model_said(saved: Path, tmp_path: Path) -> None:
    found = judged(saved, tmp_path)
    assert len(found) >= 2
    assert found == expected(saved.name, found)
    if saved.name == "verl":
        converter.merge_lora(saved / "merger" / "adapter", tmp_path / "known", base=saved / "base")
        given = converter.merge_lora(
            saved / "merger-alpha-lost" / "adapter", tmp_path / "given", base=saved / "base", lora_alpha=6
        )
        assert given.receipt is not None
        held = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("known", "given")]
        assert held[0] == held[1]
