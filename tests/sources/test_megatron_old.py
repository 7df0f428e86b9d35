"""Megatron's old format, a file for each rank: put together to what lived, or refused with what is missing."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from converter.errors import ConvertError
from converter.sources.finding import find_place, kind_of
from converter.sources.megatron.source import SOURCE
from mcore.compare import RUNS
from megatron_ranks import edit_rank
from zero.compare import evaluated

OLD = RUNS / "old-qwen2-tp2-pp2"


def _copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(OLD / "iter_0000010", tmp_path / "run" / "iter_0000010"))


def _saved(folder: Path, ranks: dict[str, dict[str, Any]], **arguments: Any) -> Path:
    """Ranks' files as Megatron saves them."""
    for name, model in ranks.items():
        (folder / f"mp_rank_{name}").mkdir(parents=True)
        state = {"args": argparse.Namespace(**arguments), "checkpoint_version": 3.0, "iteration": 1, **model}
        torch.save(state, folder / f"mp_rank_{name}" / "model_optim_rng.pt")
    return folder


def _refused(folder: Path, code: str) -> ConvertError:
    with pytest.raises(ConvertError) as caught:
        SOURCE.open(folder, asked="x")
    assert caught.value.code == code, caught.value
    assert [f.code for f in SOURCE.survey(folder).faults] == [code]
    return caught.value


def test_it_is_found_from_the_runs_folder(tmp_path: Path) -> None:
    folder = _copy(tmp_path)
    for place in (folder, folder.parent):
        assert kind_of(place) == "megatron"
        assert find_place(place, "x").folder == folder


def test_a_rank_that_is_missing_is_named(tmp_path: Path) -> None:
    folder = _copy(tmp_path)
    shutil.rmtree(folder / "mp_rank_01_001")
    assert "TP 1, PP 1" in _refused(folder, "megatron-rank-missing").what


def test_copies_that_differ_between_ranks_are_refused(tmp_path: Path) -> None:
    folder = _copy(tmp_path)
    edit_rank(folder, "01_001", lambda s: s["model"]["decoder.final_layernorm.weight"].add_(1))
    assert "decoder.final_layernorm.weight" in _refused(folder, "megatron-copies").what


@pytest.mark.parametrize(("copied", "over"), [("00_000", "01_000"), ("00_000", "00_001")], ids=["tp", "pp"])
def test_a_rank_s_file_that_is_a_copy_of_another_s_is_refused(copied: str, over: str, tmp_path: Path) -> None:
    folder = _copy(tmp_path)
    (copied_file,) = (folder / f"mp_rank_{copied}").iterdir()
    shutil.copyfile(copied_file, folder / f"mp_rank_{over}" / copied_file.name)
    assert "one file is a copy of the other" in _refused(folder, "megatron-copies").what


def test_ranks_of_experts_repeat_each_other_on_a_stage_without_experts(tmp_path: Path) -> None:
    """DeepSeek's first layers are dense, and every EP rank saves them."""
    dense = {"decoder.layers.0.input_layernorm.weight": torch.arange(3.0)}
    key = "decoder.layers.0.mlp.experts.local_experts.0.linear_fc2.weight"
    folder = _saved(
        tmp_path / "run",
        {
            **{f"00_000_00{n}": {"model": dense} for n in range(2)},
            **{f"00_001_00{n}": {"model": {key: torch.full((2, 3), float(n))}} for n in range(2)},
        },
        num_layers=2,
        hidden_size=2,
        num_experts=2,
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=2,
        expert_model_parallel_size=2,
    )
    assert len(SOURCE.open(folder, asked="x").tensors) == 2


def test_a_rank_of_another_run_is_refused(tmp_path: Path) -> None:
    folder = _copy(tmp_path)
    edit_rank(folder, "01_000", lambda s: setattr(s["args"], "hidden_size", 32))
    _refused(folder, "megatron-mixed")


def test_a_file_without_arguments_is_refused(tmp_path: Path) -> None:
    folder = _copy(tmp_path)
    edit_rank(folder, "00_000", lambda s: s.pop("args"))
    _refused(folder, "megatron-malformed")


def test_names_of_ranks_mean_what_the_arguments_say(tmp_path: Path) -> None:
    """`mp_rank_00_001` is a PP rank or an EP rank."""
    key = "mlp.experts.local_experts.0.linear_fc2.weight"
    layer = {f"decoder.layers.0.{key}": torch.zeros(2, 3)}
    other = {f"decoder.layers.0.{key}": torch.ones(2, 3)}
    sizes = {"num_layers": 2, "hidden_size": 2, "num_experts": 1, "tensor_model_parallel_size": 1}
    stages = _saved(
        tmp_path / "pp",
        {"00_000": {"model": layer}, "00_001": {"model": other}},
        pipeline_model_parallel_size=2,
        **sizes,
    )
    got = evaluated(SOURCE.open(stages, asked="x").tensors)
    name = "mlp.experts.experts.linear_fc2.weight"
    assert {n: t.tolist() for n, t in got.items()} == {
        f"decoder.layers.0.{name}": [[[0.0] * 3] * 2],
        f"decoder.layers.1.{name}": [[[1.0] * 3] * 2],
    }
    experts = _saved(
        tmp_path / "ep",
        {"00_000": {"model": layer}, "00_001": {"model": other}},
        expert_model_parallel_size=2,
        **{**sizes, "num_experts": 2},
    )
    got = evaluated(SOURCE.open(experts, asked="x").tensors)
    assert {n: t.tolist() for n, t in got.items()} == {f"decoder.layers.0.{name}": [[[0.0] * 3] * 2, [[1.0] * 3] * 2]}


@pytest.mark.parametrize("sizes", [{"padded_vocab_size": 8}, {}], ids=["vocabulary-told", "untold"])
def test_a_critics_row_is_whole_on_each_rank_and_an_output_embedding_is_split(
    sizes: dict[str, int], tmp_path: Path
) -> None:
    """Megatron's value heads are no parallel layers: each TP rank has the one row, and saves it."""
    row, rows = torch.tensor([[1.0, 2.0, 3.0]]), torch.arange(24.0).view(8, 3)
    given = {"num_layers": 1, "tensor_model_parallel_size": 2, **sizes}
    ranks = ("00", "01")
    critic = _saved(tmp_path / "critic", {r: {"model": {"output_layer.weight": row.clone()}} for r in ranks}, **given)
    actor = _saved(
        tmp_path / "actor",
        {r: {"model": {"output_layer.weight": rows[4 * n : 4 * n + 4].clone()}} for n, r in enumerate(ranks)},
        **given,
    )
    held = [evaluated(SOURCE.open(f, asked="x").tensors)["output_layer.weight"] for f in (critic, actor)]
    assert [t.tolist() for t in held] == [row.tolist(), rows.tolist()]


def test_virtual_stages_are_put_in_the_order_of_layers(tmp_path: Path) -> None:
    def stage(*values: float) -> dict[str, Any]:
        key = "decoder.layers.0.mlp.linear_fc2.weight"
        return {f"model{n}": {key: torch.full((1, 1), v)} for n, v in enumerate(values)}

    folder = _saved(
        tmp_path / "run",
        {"00_000": stage(0, 2), "00_001": stage(1, 3)},
        num_layers=4,
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=2,
    )
    got = evaluated(SOURCE.open(folder, asked="x").tensors)
    assert [got[f"decoder.layers.{n}.mlp.linear_fc2.weight"].item() for n in range(4)] == [0, 1, 2, 3]


def test_a_table_of_stages_is_not_guessed_at(tmp_path: Path) -> None:
    folder = _copy(tmp_path)
    for rank in ("00_000", "00_001", "01_000", "01_001"):
        edit_rank(folder, rank, lambda s: setattr(s["args"], "pipeline_model_parallel_layout", "Et|tL"))
    _refused(folder, "megatron-backend")


def test_there_are_no_masters_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConvertError) as caught:
        SOURCE.open_masters(_copy(tmp_path), asked="x")
    assert caught.value.code == "dcp-no-masters"
    with pytest.raises(ConvertError) as caught:
        SOURCE.adam_moments(_copy(tmp_path / "again"), which="exp_avg")
    assert caught.value.code == "dcp-no-moments"
