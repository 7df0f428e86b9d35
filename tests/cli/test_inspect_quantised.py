"""`inspect` of quantised models: which weights, how, what they were made from, and what makes them whole."""

from __future__ import annotations

from pathlib import Path

import pytest

import quantised
from oracle.bases import edit_config, read_tensors
from oracle.command import run


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> quantised.Folder:
    return quantised.make(tmp_path_factory.mktemp("inspected"), "nf4-nested")


def test_a_quantised_model_is_shown_with_its_weights_and_the_way_on(model: quantised.Folder) -> None:
    text = run("inspect", model.path).text
    assert "quantised: 14 NF4, doubly quantised: model.layers.{0..1}.mlp.down_proj.weight" in text
    assert f"rlhf-convert reshard {model.path} {model.path}-whole --dequantize" in text
    whole = sum(t.numel() for t in read_tensors(model.whole.path).values())
    assert f"{whole / 1000:.0f} K parameters" in text or f"{whole / 1000:.3g} K parameters" in text
    assert "made from" not in text


def test_the_full_precision_model_is_named_where_the_card_or_the_name_says_it(
    model: quantised.Folder, tmp_path: Path
) -> None:
    card = "---\nbase_model: Qwen/Qwen2.5-7B\nbase_model_relation: quantized\n---\n# A model\n"
    (model.path / "README.md").write_text(card)
    assert "made from Qwen/Qwen2.5-7B, which is in full precision" in run("inspect", model.path).text
    (model.path / "README.md").write_text(card.replace("Qwen/Qwen2.5-7B", "someone/Qwen2.5-7B-GPTQ"))
    assert "made from" not in run("inspect", model.path).text
    (model.path / "README.md").unlink()


@pytest.mark.parametrize(
    "method",
    [
        "torchao",
        "hqq",
        *(
            pytest.param(m, marks=pytest.mark.slow)
            for m in ("aqlm", "quanto", "eetq", "spqr", "vptq", "bitnet", "quark")
        ),
    ],
)
def test_a_format_that_is_not_read_is_named_and_no_command_is_offered_that_would_be_refused(
    method: str, tmp_path: Path
) -> None:
    folder = quantised.make(tmp_path, "fp8-blocks")
    edit_config(folder.path, quantization_config={"quant_method": method})
    text = run("inspect", folder.path).text
    assert "can't be made whole here" in text and method in text.lower()
    assert "--dequantize" not in text
    ran = run("reshard", folder.path, tmp_path / "out", "--dequantize")
    assert ran.code == 3 and not (tmp_path / "out").exists()
    assert "quantised-unsupported" in ran.text and method in ran.text.lower()
