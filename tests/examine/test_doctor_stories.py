"""What doctor and merge-lora say of folders that people had: one cause once, the true story, no step in a circle."""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from converter.shipped import shipped
from oracle.command import run
from places import RUNS

HEAD = RUNS / "repair/runs/head"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("tiny-qwen2-base", "tiny-reward-adapter"):
        shutil.copytree(shipped("fixtures") / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def with_nan(folder: Path) -> str:
    """Put one NaN into an adapter's first lora_B; its name."""
    file = folder / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    name = next(n for n in header if "lora_B" in n and header[n]["dtype"] == "F32")
    at = 8 + length + header[name]["data_offsets"][0]
    data[at : at + 4] = struct.pack("<f", float("nan"))
    file.write_bytes(data)
    return str(name)


def test_a_nan_in_an_adapter_is_one_finding_and_its_step_does_not_lead_back(here: Path) -> None:
    name = with_nan(here / "tiny-reward-adapter")
    refused = run("merge-lora", "tiny-reward-adapter", "out")
    assert refused.code == 3
    assert refused.err.count(name) == 2
    assert "Next:    rlhf-convert doctor tiny-reward-adapter --deep" in refused.err
    told = json.loads(run("doctor", "tiny-reward-adapter", "--deep", "--json").out)["findings"]
    assert [f["code"] for f in told if f["severity"] != "cosmetic"] == ["nonfinite"]
    assert not any("doctor" in (f["next"] or "") for f in told)


def test_a_frozen_weight_that_the_runs_shards_hold_is_said_to_be_there(here: Path) -> None:
    shutil.copytree(HEAD, here / "run")
    told = json.loads(run("doctor", "run/checkpoint-2", "--json").out)["findings"]
    (lost,) = (f for f in told if f["code"] == "head-base-lost")
    assert lost["recoverability"] == "from run/checkpoint-2/global_step2"
    assert "is in run/checkpoint-2/global_step2, and not in this folder" in lost["message"]


def test_without_the_shards_it_is_in_no_file_here_and_the_refusal_asks_for_them(here: Path) -> None:
    shutil.copytree(HEAD, here / "run")
    shutil.rmtree(here / "run/checkpoint-2/global_step2")
    told = json.loads(run("doctor", "run/checkpoint-2", "--json").out)["findings"]
    (lost,) = (f for f in told if f["code"] == "head-base-lost")
    assert lost["recoverability"] == "lost"
    assert "is in no file here" in lost["message"]
    refused = run("merge-lora", "run/checkpoint-2", "out", "--base", "tiny-qwen2-base")
    assert refused.code in (2, 3)
    assert "DIR" not in refused.err
    assert "--weights-from and a folder of the same run that still holds them" in refused.text


def test_a_broken_set_beside_the_one_that_is_read_is_told_with_what_is_wrong_with_each_file(here: Path) -> None:
    """vLLM takes the files of the index, or all: where transformers reads a whole file, it stops."""
    folder = here / "tiny-qwen2-base"
    tensors = {n: t for f in folder.glob("model-*.safetensors") for n, t in load_file(f).items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    sound = run("doctor", "tiny-qwen2-base").out
    cut, pointer = sorted(folder.glob("model-*.safetensors"))
    os.truncate(cut, cut.stat().st_size - 100)
    pointer.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 113840\n")
    told = json.loads(run("doctor", "tiny-qwen2-base", "--json").out)["findings"]
    (found,) = [f for f in told if f["code"] == "stale-shards"]
    assert f"{cut.name}: the file is cut short" in found["message"]
    assert f"{pointer.name}: a pointer of git-lfs" in found["message"]
    assert "cut short" not in sound and "stale-shards" in sound
