"""An adapter that gather or repair writes is compared with its base where that is at hand, else it is noted."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import transformers
from safetensors.torch import load_file, save_file

from converter.cli import main
from oracle.bases import edit_config
from places import RUNS

RUN = RUNS / "dcp" / "runs" / "accelerate-lora-n2"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of the run's config."""
    folder = tmp_path_factory.mktemp("base")
    config = transformers.AutoConfig.from_pretrained(RUN)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def test_without_a_base_it_is_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gather", str(RUN), str(tmp_path / "out")]) == 0
    assert "not compared with a base" in "".join(capsys.readouterr())


def test_an_adapter_that_fits_its_base_is_written(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["gather", str(RUN), str(tmp_path / "out"), "--base", str(base)]) == 0
    assert "not compared" not in "".join(capsys.readouterr())


@pytest.mark.parametrize("verb", ["repair", "gather"])
def test_an_adapter_of_another_base_is_refused(
    verb: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = shutil.copytree(base, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    name = next(n for n in weights if n.endswith("q_proj.weight"))
    wide = {n: t[:, :-4].clone() if n == name else t for n, t in weights.items()}
    save_file(wide, other / "model.safetensors", {"format": "pt"})
    source = RUN
    if verb == "repair":
        source = tmp_path / "adapter"
        assert main(["gather", str(RUN), str(source), "-q"]) == 0
        edit_config(source, "adapter_config.json", base_model_name_or_path=str(other))
    capsys.readouterr()
    assert main([verb, str(source), str(tmp_path / "out"), "--base", str(other)]) == 3
    assert "adapter-shape" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
