"""Pieces of torch's HuggingFaceStorageWriter: put together bit by bit, or refused; none is lost without a word."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from converter.errors import Refused
from converter.sources.dcp.source import SOURCE
from dcp.compare import RUNS
from oracle.command import run

RUN = RUNS / "hf-shards-n2"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(RUN, tmp_path / "run"))


def pieces(run: Path) -> list[Path]:
    return sorted(run.rglob("shard-*.safetensors"))


def code_of(run: Path) -> str:
    with pytest.raises(Refused) as caught:
        SOURCE.open(run, asked="run")
    return caught.value.code


def test_the_model_is_what_lived_in_training(copy: Path, tmp_path: Path) -> None:
    ran = run("gather", copy, tmp_path / "out")
    assert ran.code == 0, ran.text
    live = {n.removeprefix("model\0"): t for n, t in load_file(RUN / "oracle.safetensors").items()}
    made = load_file(tmp_path / "out" / "model.safetensors")
    named = {n.rpartition("/")[2]: t for n, t in live.items()}
    assert made
    assert all(any(torch.equal(t, other) for other in named.values()) for t in made.values())


def test_nemo_rl_s_run_is_found_from_its_top(copy: Path, tmp_path: Path) -> None:
    weights = tmp_path / "nemo" / "step_10" / "policy" / "weights" / "model"
    weights.mkdir(parents=True)
    for piece in pieces(copy):
        shutil.copy(piece, weights)
    (tmp_path / "base").mkdir()
    shutil.copy(RUN / "config.json", tmp_path / "base")
    ran = run("gather", tmp_path / "nemo", tmp_path / "out", "--dry-run")
    assert "step_10/policy/weights/model" in ran.text
    assert "config.json" in ran.text


@pytest.mark.parametrize("lost", [0, 1])
def test_a_rank_that_is_lost_is_noticed(copy: Path, tmp_path: Path, lost: int) -> None:
    for piece in pieces(copy):
        if piece.name.startswith(f"shard-{lost + 1:05d}"):
            piece.unlink()
    ran = run("gather", copy, tmp_path / "out")
    assert ran.code == 3
    assert not (tmp_path / "out").exists()


def test_a_lost_rank_of_an_unknown_family_could_not_be_noticed_so_it_is_refused(copy: Path, tmp_path: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    config |= {"model_type": "unheard-of", "architectures": ["UnheardOfForSequenceClassification"]}
    (copy / "config.json").write_text(json.dumps(config))
    ran = run("gather", copy, tmp_path / "out")
    assert ran.code == 3
    assert "REFUSED dcp-hf-shards" in ran.err


def test_a_file_of_a_rank_that_is_missing_is_named(copy: Path) -> None:
    pieces(copy)[1].unlink()
    assert code_of(copy) == "dcp-file-missing"


def test_pieces_that_overlap_or_leave_a_gap_are_refused(copy: Path) -> None:
    path = pieces(copy)[-1]
    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
    offsets = json.loads(metadata["DCP_SHARDING_INFO"])
    name = next(n for n, each in offsets.items() if any(each["saved_offsets"]))
    offsets[name]["saved_offsets"][0] += 1
    save_file(load_file(path), path, {**metadata, "DCP_SHARDING_INFO": json.dumps(offsets)})
    assert code_of(copy) == "dcp-chunks"


def test_a_piece_that_does_not_say_where_it_begins_is_refused(copy: Path) -> None:
    path = pieces(copy)[0]
    save_file(load_file(path), path, {"format": "pt"})
    assert code_of(copy) == "dcp-record"
