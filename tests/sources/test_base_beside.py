"""A base that an adapter records by a relative path is found from where the training was started."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from converter.cli import main
from doctored import adapter, causal, codes, edit

__all__ = ["causal"]


@pytest.mark.filterwarnings("ignore")
def test_a_base_recorded_from_above_the_run_is_the_same_for_every_verb(
    causal: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = adapter(causal, tmp_path / "work" / "out" / "checkpoint-5")
    shutil.copytree(causal, tmp_path / "work" / "models" / "llama")
    edit(made, "adapter_config.json", base_model_name_or_path="models/llama")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    typed, base = "../work/out/checkpoint-5", "../work/models/llama"
    assert main(["inspect", typed]) == 0
    assert f"base     {base}, here" in capsys.readouterr().out
    assert main(["doctor", typed]) == 0
    assert f"base     {base}, at hand" in capsys.readouterr().out
    assert main(["merge-lora", typed, "merged"]) == 0
    assert f"base     {base}" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "work" / "models")
    assert main(["merge-lora", typed, "again"]) == 3
    assert codes(Path(typed)) == {}
