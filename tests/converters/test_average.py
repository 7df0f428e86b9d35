"""`average`, `interpolate`: torch's mean in fp64, rounded once; what differs in more than values is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import converter
from converter.cli import main
from converter.errors import Refused, UsageError
from places import REPOSITORY

BASE = REPOSITORY / "fixtures" / "tiny-qwen2-base"
Values = dict[str, torch.Tensor]


def values(folder: Path) -> Values:
    return {n: t for file in sorted(folder.glob("*.safetensors")) for n, t in load_file(file).items()}


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    """The shipped base under three lots of noise."""
    made = [tmp_path / f"model-{n}" for n in range(3)]
    for seed, folder in enumerate(made):
        shutil.copytree(BASE, folder)
        noise = torch.Generator().manual_seed(seed)
        for file in folder.glob("*.safetensors"):
            held = {n: (t.float() + 0.1 * torch.randn(t.shape, generator=noise)).to(t.dtype) for n, t in
                    load_file(file).items()}  # fmt: skip
            save_file(held, file, metadata={"format": "pt"})
    return made


def expected(models: list[Path], shares: list[float]) -> Values:
    held = [values(m) for m in models]
    return {
        n: sum((m[n].double() * s for m, s in zip(held, shares, strict=True)), torch.zeros(())).to(t.dtype)
        for n, t in held[0].items()
    }


def expect_equal(folder: Path, wanted: Values) -> None:
    found = values(folder)
    assert set(found) == set(wanted)
    assert [n for n in wanted if not torch.equal(found[n], wanted[n])] == []


def test_the_weighted_mean_is_torchs_in_fp64_rounded_once(models: list[Path], tmp_path: Path) -> None:
    weights = ["--weight", "1", "--weight", "2", "--weight", "5"]
    assert main(["average", *map(str, models), str(tmp_path / "out"), *weights]) == 0
    expect_equal(tmp_path / "out", expected(models, [0.125, 0.25, 0.625]))
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (models[0] / "tokenizer.json").read_bytes()


def test_interpolation_goes_from_a_to_b_and_beyond(models: list[Path], tmp_path: Path) -> None:
    for t in (0.0, 0.25, 1.5):
        converter.interpolate(models[0], models[1], tmp_path / f"at-{t}", t=t)
        expect_equal(tmp_path / f"at-{t}", expected(models[:2], [1 - t, t]))


def test_a_cast_on_the_way_rounds_the_mean_once(models: list[Path], tmp_path: Path) -> None:
    converter.average(models[:2], tmp_path / "out", dtype="fp32")
    held = [values(m) for m in models[:2]]
    wanted = {n: (t.double() * 0.5 + held[1][n].double() * 0.5).float() for n, t in held[0].items()}
    expect_equal(tmp_path / "out", wanted)


def change_config(folder: Path, **more: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | more))


def change_weights(folder: Path, change: Any) -> None:
    file = next(f for f in folder.glob("*.safetensors") if "model.norm.weight" in load_file(f))
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


DIFFERENT = {
    "a dtype": (
        lambda f: change_weights(f, lambda h: h | {"model.norm.weight": h["model.norm.weight"].float()}),
        "other shapes or dtypes",
    ),
    "the config": (lambda f: change_config(f, rope_theta=5.0), "rope_theta"),
    "the tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), r"tokenizer\.json"),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_models_that_differ_in_more_than_values_are_refused(what: str, models: list[Path], tmp_path: Path) -> None:
    harm, words = DIFFERENT[what]
    harm(models[1])
    with pytest.raises(Refused, match=words) as refused:
        converter.average(models, tmp_path / "out")
    assert refused.value.code == "models-differ"
    assert not (tmp_path / "out").exists()


def test_where_a_model_comes_from_is_no_difference(models: list[Path], tmp_path: Path) -> None:
    change_config(models[1], _name_or_path="elsewhere", transformers_version="4.1")
    converter.average(models, tmp_path / "out")
    expect_equal(tmp_path / "out", expected(models, [1 / 3] * 3))


def test_an_adapter_is_not_averaged(models: list[Path], tmp_path: Path) -> None:
    with pytest.raises(Refused, match="an adapter"):
        converter.average([models[0], REPOSITORY / "fixtures" / "tiny-reward-adapter"], tmp_path / "out")


@pytest.mark.parametrize("weights", [[1.0], [1.0, -1.0], [float("nan"), 1.0]])
def test_weights_that_make_no_mean_are_refused(weights: list[float], models: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        converter.average(models[:2], tmp_path / "out", weights=weights)


def test_one_model_and_an_output_are_no_average(models: list[Path], tmp_path: Path) -> None:
    assert main(["average", str(models[0]), str(tmp_path / "out")]) == 2
