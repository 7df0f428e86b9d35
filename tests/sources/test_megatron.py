"""Megatron's checkpoints found and read: wherever trainers keep them, finished or not, and nothing in them is run."""

from __future__ import annotations

import argparse
import functools
import json
import os
import pickle  # noqa: TID251
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

from converter.errors import ConvertError, UsageError
from converter.sources.dcp.metadata import read_metadata
from converter.sources.finding import find_place, kind_of
from converter.sources.megatron.arguments import read_arguments
from converter.sources.megatron.source import SOURCE
from converter.sources.opening import InputSpec, open_checkpoint
from mcore.compare import RUNS, shards
from zero.compare import differences, evaluated

LLAMA, CRITIC, QWEN2 = RUNS / "llama-layers-pp2", RUNS / "qwen3-critic-tp2", RUNS / "qwen2-tied-tp2-pp2"


def _copy(tmp_path: Path, run: Path, name: str = "run/iter_0000010") -> Path:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copytree(shards(run), tmp_path / name))


def _refused(folder: Path, code: str) -> ConvertError:
    with pytest.raises(ConvertError) as caught:
        SOURCE.open(folder, asked="x")
    assert caught.value.code == code, caught.value
    if isinstance(caught.value, UsageError):
        return caught.value
    assert [f.code for f in SOURCE.survey(folder).faults] == [code]
    return caught.value


def _saved(folder: Path, state: dict[str, Any]) -> Path:
    """A distributed checkpoint that torch itself writes, with Megatron's manifest."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, that one process saves alone
        dcp.save(state, checkpoint_id=folder, planner=DefaultSavePlanner(flatten_state_dict=False), no_dist=True)
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))
    return folder


# Where checkpoints lie


@pytest.mark.parametrize(
    ("inner", "root", "part"),
    [
        ("iter_0000010", "run", None),
        ("release", "run", None),
        ("global_step_10/actor/dist_ckpt", "run", None),
        ("global_step_10/critic/dist_ckpt", "run/global_step_10/critic", "critic"),
        ("global_step_10/actor/model/dist_ckpt", "run/global_step_10", "actor"),
        ("step_10/policy/weights/iter_0000000", "run", "policy"),
        ("step_10/value/weights/iter_0000000", "run", "critic"),
        ("checkpoint-10/iter_0000010", "run/checkpoint-10", None),
        ("iter_0000001/dist_model", "run", None),
    ],
)
def test_a_checkpoint_is_found_from_the_runs_folder_and_from_folders_on_the_way(
    tmp_path: Path, inner: str, root: str, part: str | None
) -> None:
    folder = _copy(tmp_path, LLAMA, f"run/{inner}")
    for place in (tmp_path / root, folder, tmp_path / "run"):
        assert kind_of(place) == "megatron"
        assert find_place(place, "x", part=part).folder == folder


def test_an_optimizers_own_folder_is_not_taken_for_a_model(tmp_path: Path) -> None:
    model = _copy(tmp_path, LLAMA, "run/global_step_3/actor/model/dist_ckpt")
    for aside in ("optimizer", "extra"):
        _copy(tmp_path, LLAMA, f"run/global_step_3/actor/{aside}/dist_ckpt")
    assert find_place(tmp_path / "run", "x").folder == model


def test_of_several_steps_the_runs_tracker_says_which(tmp_path: Path) -> None:
    old, new = (_copy(tmp_path, LLAMA, f"run/iter_{n:07d}") for n in (5, 10))
    with pytest.raises(UsageError) as caught:
        find_place(tmp_path / "run", "x")
    assert caught.value.code == "several-checkpoints"
    assert "--tag iter_0000010" in str(caught.value.next)
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("5\n")
    assert find_place(tmp_path / "run", "x").folder == old
    assert find_place(tmp_path / "run", "x", tag="10").folder == new
    with pytest.raises(UsageError) as caught:
        find_place(tmp_path / "run", "x", tag="7")
    assert caught.value.code == "no-such-tag"


def test_of_several_parts_one_has_to_be_named(tmp_path: Path) -> None:
    actor, critic = (_copy(tmp_path, LLAMA, f"run/global_step_3/{p}/dist_ckpt") for p in ("actor", "critic"))
    with pytest.raises(UsageError) as caught:
        find_place(tmp_path / "run", "x")
    assert caught.value.code == "several-parts"
    assert set(caught.value.offers) == {"actor", "critic"}
    assert find_place(tmp_path / "run", "x", part="value").folder == critic
    assert find_place(tmp_path / "run", "x", part="policy").folder == actor
    with pytest.raises(UsageError) as caught:
        find_place(actor, "x", part="critic")
    assert caught.value.code == "no-such-part"


# What is not whole, or not read


def test_a_missing_file_is_named_with_what_is_lost(tmp_path: Path) -> None:
    folder = _copy(tmp_path, QWEN2)
    (folder / "__3_0.distcp").unlink()
    error = _refused(folder, "dcp-file-missing")
    assert "1 of 8 files are missing: __3_0.distcp" in error.what


def test_a_save_without_its_last_file_is_refused(tmp_path: Path) -> None:
    folder = _copy(tmp_path, LLAMA)
    (folder / "metadata.json").unlink()
    assert kind_of(folder) == "megatron"
    _refused(folder, "megatron-unfinished")


def test_newer_versions_have_no_common_file_and_a_save_without_its_last_is_refused_too(tmp_path: Path) -> None:
    folder = _copy(tmp_path, LLAMA)
    (folder / "metadata.json").unlink()
    (folder / "common.pt").unlink()
    with pytest.raises(ConvertError) as caught:
        open_checkpoint(InputSpec(str(folder)), token=None, keep_code=False)
    assert caught.value.code == "megatron-unfinished"


def test_without_the_hidden_file_it_is_said_how_copies_lose_it(tmp_path: Path) -> None:
    folder = _copy(tmp_path, LLAMA)
    (folder / ".metadata").unlink()
    assert "cp DIR/*" in str(_refused(folder, "dcp-metadata-missing").next)


@pytest.mark.parametrize("backend", ["zarr", "fsdp_dtensor", "torch_dcp", "of-tomorrow"])
def test_other_backends_are_refused_by_name(tmp_path: Path, backend: str) -> None:
    folder = _copy(tmp_path, LLAMA)
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": backend}))
    assert backend in _refused(folder, "megatron-backend").what


def test_an_optimizer_alone_is_no_model(tmp_path: Path) -> None:
    folder = _saved(tmp_path / "iter_0000001", {"optimizer.state.exp_avg.output_layer.weight": torch.ones(2, 3)})
    _refused(folder, "dcp-no-model")


# What is read


def test_halves_and_experts_that_were_saved_apart_come_together(tmp_path: Path) -> None:
    stem = "decoder.layers.1.mlp.experts.experts"
    state = {
        f"{stem}.{e}.linear_fc1.weight_{h}": torch.full((3, 2), 10.0 * e + (h == "v")) for e in range(2) for h in "wv"
    }
    state["decoder.layers.1.mlp.linear_fc1.weight_w"] = torch.zeros(2, 2)
    state["decoder.layers.1.mlp.linear_fc1.weight_v"] = torch.ones(2, 2)
    state["decoder.final_layernorm.weight"] = torch.ones(2)
    got = evaluated(SOURCE.open(_saved(tmp_path / "iter_0000001", state), asked="x").tensors)
    assert got["decoder.layers.1.mlp.linear_fc1.weight"].tolist() == [[0, 0], [0, 0], [1, 1], [1, 1]]
    assert got[f"{stem}.linear_fc1.weight"][:, :, 0].tolist() == [[0, 0, 0, 1, 1, 1], [10, 10, 10, 11, 11, 11]]


def test_masters_and_moments_are_read_where_they_have_names(tmp_path: Path) -> None:
    key = "decoder.layers.mlp.linear_fc2.weight"
    low = torch.arange(12.0).reshape(2, 2, 3)
    state = {key: low.bfloat16()}
    for leaf, scale in (("fp32_param", 1.001), ("exp_avg", 0.5), ("exp_avg_sq", 0.25)):
        state[f"optimizer.state.{leaf}.{key}"] = low * scale
    folder = _saved(tmp_path / "iter_0000001", state)
    names = [f"decoder.layers.{n}.mlp.linear_fc2.weight" for n in range(2)]
    masters = SOURCE.open_masters(folder, asked="x")
    assert differences(evaluated(masters.tensors), dict(zip(names, low * 1.001, strict=True))) == []
    assert (
        differences(evaluated(SOURCE.open(folder, asked="x").tensors), dict(zip(names, low.bfloat16(), strict=True)))
        == []
    )
    assert (
        differences(evaluated(SOURCE.adam_moments(folder, which="exp_avg")), dict(zip(names, low * 0.5, strict=True)))
        == []
    )


def test_masters_in_flat_buffers_are_refused_with_the_flag_that_saves_them(tmp_path: Path) -> None:
    bucket = "optimizer.distributed.dp_group_idx_0.gbuf_idx_0.dtype_bf16.bucket_idx_0"
    state = {"decoder.final_layernorm.weight": torch.ones(2).bfloat16(), f"{bucket}.param": torch.ones(2)}
    folder = _saved(tmp_path / "iter_0000001", state)
    with pytest.raises(ConvertError) as caught:
        SOURCE.open_masters(folder, asked="x")
    assert caught.value.code == "dcp-no-masters"
    assert "--dist-ckpt-optim-fully-reshardable" in caught.value.what
    with pytest.raises(ConvertError) as caught:
        SOURCE.adam_moments(folder, which="exp_avg")
    assert caught.value.code == "dcp-no-moments"


# Nothing is run


class _Hostile:
    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._mark),)


def test_a_hostile_common_file_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    folder = _copy(tmp_path, LLAMA)
    torch.save({"args": _Hostile(tmp_path / "mark")}, folder / "common.pt")
    _refused(folder, "pickle-names")
    assert not (tmp_path / "mark").exists()


def test_a_hostile_metadata_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    folder = _copy(tmp_path, LLAMA)
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    metadata.planner_data = _Hostile(tmp_path / "mark")
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    _refused(folder, "pickle-names")
    assert not (tmp_path / "mark").exists()


def test_arguments_of_any_class_are_data(tmp_path: Path) -> None:
    folder = _copy(tmp_path, LLAMA)
    args = argparse.Namespace(
        num_layers=2, swiglu=True, params_dtype=torch.bfloat16, path=Path("x"),
        init=functools.partial(torch.nn.init.normal_), worker=torch.nn.functional.silu, name="llama",
        rate=0.5, nothing=None, listed=[1, 2],
    )  # fmt: skip
    torch.save({"args": args, "iteration": 10}, folder / "common.pt")
    found, _ = read_arguments(read_metadata(folder))
    assert found == {
        "num_layers": 2, "swiglu": True, "params_dtype": "bfloat16", "name": "llama", "rate": 0.5, "nothing": None,
    }  # fmt: skip


def test_arguments_of_newer_versions_lie_in_the_checkpoint(tmp_path: Path) -> None:
    """Since 0.19 there is no `common.pt`."""
    common = [{"args": argparse.Namespace(num_layers=1, params_dtype=torch.bfloat16), "iteration": 10}]
    state = {"common_state/shard_0_1": common, "decoder.final_layernorm.weight": torch.ones(2)}
    folder = _saved(tmp_path / "iter_0000010", state)
    assert not (folder / "common.pt").exists()
    found, _ = read_arguments(read_metadata(folder))
    assert found == {"num_layers": 1, "params_dtype": "bfloat16"}
    assert set(SOURCE.open(folder, asked="x").tensors) == {"decoder.final_layernorm.weight"}


def test_classes_of_older_versions_in_the_metadata_are_data(tmp_path: Path) -> None:
    """Until 0.15 plans and the table itself were of Megatron's own classes."""
    folder = _copy(tmp_path, LLAMA)
    raw = (folder / ".metadata").read_bytes()
    metadata = pickle.loads(raw)
    metadata.mcore_data = {}
    plain = pickle.dumps(metadata, protocol=2)
    old = plain.replace(
        b"ctorch.distributed.checkpoint.metadata\nMetadata\n",
        b"cmegatron.core.dist_checkpointing.strategies.torch\nMCoreMetadata\n",
    )
    assert old != plain
    (folder / ".metadata").write_bytes(old)
    assert (
        differences(
            evaluated(SOURCE.open(folder, asked="x").tensors), evaluated(SOURCE.open(shards(LLAMA), asked="x").tensors)
        )
        == []
    )
