"""Heads in files of their own: read with the folder that they lie in, and carried to the output or accounted for."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from converter.core.checkpoint import Checkpoint
from converter.core.files.opening import identity
from converter.errors import Refused
from converter.sources import locate
from converter.sources.hf import peft
from converter.sources.hf import source as hf
from converter.sources.survey import Survey
from durability import FIXTURES, copy_inputs
from oracle.command import run
from small_models import Tensors, load, numbers, same, save_model

HEAD = {"v_head.summary.weight": numbers(1, 64), "v_head.summary.bias": numbers(1, seed=1)}
AREAL = {"weight": numbers(1, 64, seed=2)}


def save_old(tensors: Tensors, path: Path) -> None:
    """The layout before torch 1.6."""
    torch.save(tensors, path, _use_new_zipfile_serialization=False)


WRITERS: dict[str, tuple[str, Tensors, Callable[[Tensors, Path], None]]] = {
    "llamafactory": ("value_head.safetensors", HEAD, lambda t, p: save_file(t, p, metadata={"format": "pt"})),
    "llamafactory-bin": ("value_head.bin", HEAD, torch.save),
    "llamafactory-old-torch": ("value_head.bin", HEAD, save_old),
    "areal": ("value_head.pt", AREAL, torch.save),
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_model(tmp_path / "model", {"model.w": numbers(64, 64)}, model_type="unheard-of")


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """The shipped base and adapter."""
    return copy_inputs(tmp_path)


def read(path: Path) -> Tensors:
    """A file of weights, by its own library."""
    if path.suffix == ".safetensors":
        return load_file(path)
    found: Tensors = torch.load(path, weights_only=True)  # noqa: TID251 - the oracle
    return found


def shapes(checkpoint: Checkpoint) -> dict[str, dict[str, tuple[int, ...]]]:
    return {file: {n: t.info.shape for n, t in tensors.items()} for file, tensors in checkpoint.beside.items()}


def codes(survey: Survey) -> dict[str, str]:
    return {f.code: f.severity for f in survey.faults}


# Reading


@pytest.mark.parametrize("kind", WRITERS)
def test_a_head_beside_a_model_is_read_with_it_and_is_no_fault(model: Path, kind: str) -> None:
    file, tensors, save = WRITERS[kind]
    save(tensors, model / file)
    opened = hf.SOURCE.open(model, asked="model")
    assert shapes(opened) == {file: {n: tuple(t.shape) for n, t in tensors.items()}}
    assert set(opened.tensors) == {"model.w"}
    assert opened.inputs[str(model / file)] == identity(model / file)
    assert codes(hf.SOURCE.survey(model)) == {}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_head_beside_an_adapter_is_read_with_it(pair: tuple[Path, Path], kind: str) -> None:
    file, tensors, save = WRITERS[kind]
    save(tensors, pair[1] / file)
    assert shapes(peft.SOURCE.open(pair[1], asked="a")) == {file: {n: tuple(t.shape) for n, t in tensors.items()}}
    assert codes(peft.SOURCE.survey(pair[1])) == {}


def test_the_head_that_trl_saves_beside_an_adapter_is_no_model(pair: tuple[Path, Path]) -> None:
    torch.save(HEAD, pair[1] / "pytorch_model.bin")
    assert list(shapes(peft.SOURCE.open(pair[1], asked="a"))) == ["pytorch_model.bin"]
    assert codes(peft.SOURCE.survey(pair[1])) == {}


@pytest.mark.parametrize("content", [HEAD | {"lm_head.weight": numbers(8, 64)}, {"step": 3}], ids=["model", "other"])
def test_another_file_of_that_name_beside_an_adapter_stays_a_remark(
    pair: tuple[Path, Path], content: Mapping[str, object]
) -> None:
    torch.save(content, pair[1] / "pytorch_model.bin")
    assert peft.SOURCE.open(pair[1], asked="a").beside == {}
    assert codes(peft.SOURCE.survey(pair[1])) == {"adapter-and-model": "cosmetic", "stray-weights": "cosmetic"}


def test_what_lies_beside_a_model_under_trls_name_is_another_model(model: Path) -> None:
    torch.save(HEAD, model / "pytorch_model.bin")
    assert hf.SOURCE.open(model, asked="model").beside == {}
    assert codes(hf.SOURCE.survey(model)) == {"stray-weights": "cosmetic"}


@pytest.mark.parametrize("file", ["value_head.safetensors", "value_head.bin", "value_head.pt"])
def test_a_head_that_cannot_be_read_is_refused_and_not_left_out(model: Path, file: str) -> None:
    (model / file).write_bytes(b"\0" * 100)
    with pytest.raises(Refused) as caught:
        hf.SOURCE.open(model, asked="model")
    assert file in str(caught.value.where)
    assert caught.value.code == ("safetensors-not" if file.endswith("safetensors") else "torch-not")


def test_a_head_that_zero3_saved_empty_is_refused(model: Path) -> None:
    save_file({"v_head.summary.weight": torch.zeros(0)}, model / "value_head.safetensors")
    with pytest.raises(Refused, match=r"1 of 1 tensors are torch.Size\(\[0\]\): v_head.summary.weight") as caught:
        hf.SOURCE.open(model, asked="model")
    assert caught.value.code == "zero3-empty-tensors"


def test_another_head_is_another_input(model: Path) -> None:
    digests = set()
    for rows in (1, 2):
        save_file({"v_head.summary.weight": numbers(rows, 64)}, model / "value_head.safetensors")
        digests.add(hf.SOURCE.open(model, asked="model").origin.header_digest)
    assert len(digests) == 2


def test_heads_are_downloaded_with_the_weights() -> None:
    assert {"value_head.safetensors", "value_head.bin", "value_head.pt"} <= set(locate.WANTED)


def test_inspect_names_the_head(model: Path) -> None:
    save_file(HEAD, model / "value_head.safetensors")
    ran = run("inspect", model)
    assert ran.code == 0
    assert "beside value_head.safetensors: v_head.summary.bias (1) fp32, v_head.summary.weight (1, 64) fp32" in ran.text


# Carried


@pytest.mark.parametrize("kind", WRITERS)
def test_reshard_carries_a_head_over(model: Path, tmp_path: Path, kind: str) -> None:
    file, tensors, save = WRITERS[kind]
    save(tensors, model / file)
    ran = run("reshard", model, tmp_path / "out", "--max-shard-size", "1MB")
    assert ran.code == 0, ran.text
    assert sorted(os.listdir(tmp_path / "out")) == sorted(
        ["config.json", "model.safetensors", "rlhf-convert.json", "tokenizer.json", file]
    )
    assert same(read(tmp_path / "out" / file), tensors)
    assert same(load_file(tmp_path / "out" / "model.safetensors"), {"model.w": numbers(64, 64)})


def test_a_head_damaged_on_the_disk_stops_the_run(model: Path, tmp_path: Path) -> None:
    torch.save(HEAD, model / "value_head.bin")
    raw = bytearray((model / "value_head.bin").read_bytes())
    at = raw.index(HEAD["v_head.summary.weight"].numpy().tobytes())
    raw[at] ^= 1
    (model / "value_head.bin").write_bytes(raw)
    ran = run("reshard", model, tmp_path / "out")
    assert ran.code == 3
    assert "input-corrupt" in ran.text
    assert sorted(os.listdir(tmp_path)) == ["model"]


def test_a_cast_rounds_the_head_too(model: Path, tmp_path: Path) -> None:
    save_file(HEAD, model / "value_head.safetensors")
    assert run("reshard", model, tmp_path / "out", "--dtype", "bf16").code == 0
    assert same(read(tmp_path / "out" / "value_head.safetensors"), {n: t.bfloat16() for n, t in HEAD.items()})


@pytest.mark.parametrize(
    ("given", "written"),
    [
        ("value_head.safetensors", "value_head.safetensors"),
        ("value_head.bin", "value_head.bin"),
        ("pytorch_model.bin", "value_head.safetensors"),
    ],
)
def test_merge_carries_the_adapters_head_to_where_llamafactory_reads_it(
    pair: tuple[Path, Path], tmp_path: Path, given: str, written: str
) -> None:
    base, adapter = pair
    (save_file if given.endswith("safetensors") else torch.save)(HEAD, adapter / given)
    ran = run("merge-lora", adapter, tmp_path / "out", "--base", base)
    assert ran.code == 0, ran.text
    assert f"the adapter's value head travels unchanged, in {written}" in ran.text
    assert same(read(tmp_path / "out" / written), HEAD)
    assert not (tmp_path / "out" / "pytorch_model.bin").exists()
    plain = run("merge-lora", FIXTURES / "tiny-reward-adapter", tmp_path / "plain", "--base", base)
    assert plain.code == 0, plain.text
    (tmp_path / "out" / written).unlink()
    assert same(load(tmp_path / "out"), load(tmp_path / "plain"))


def test_the_adapters_head_takes_the_place_of_the_bases(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = pair
    torch.save({n: t + 1 for n, t in HEAD.items()}, base / "value_head.bin")
    save_file(HEAD, adapter / "value_head.safetensors")
    assert run("merge-lora", adapter, tmp_path / "out", "--base", base).code == 0
    assert not (tmp_path / "out" / "value_head.bin").exists()
    assert same(read(tmp_path / "out" / "value_head.safetensors"), HEAD)
    receipt = json.loads((tmp_path / "out" / "rlhf-convert.json").read_text())
    assert receipt["dropped"]["value_head.bin:v_head.summary.weight"] == "replaced by the adapter's own"


def test_the_bases_head_stays_where_the_adapter_has_none(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = pair
    save_file(HEAD, base / "value_head.safetensors")
    assert run("merge-lora", adapter, tmp_path / "out", "--base", base).code == 0
    assert same(read(tmp_path / "out" / "value_head.safetensors"), HEAD)


def test_two_heads_for_one_model_are_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = pair
    save_file(HEAD, adapter / "value_head.safetensors")
    torch.save(HEAD, adapter / "pytorch_model.bin")
    ran = run("merge-lora", adapter, tmp_path / "out", "--base", base)
    assert (ran.code, "head-twice" in ran.text) == (3, True)
    (adapter / "pytorch_model.bin").unlink()
    shutil.copytree(adapter, tmp_path / "second")
    ran = run("merge-lora", adapter, tmp_path / "out", "--base", base, "--adapter", tmp_path / "second")
    assert ran.code == 3, ran.text
    assert "two adapters bring a value head of their own" in ran.text
    assert not (tmp_path / "out").exists()
