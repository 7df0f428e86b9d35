"""Distributed checkpoints that are refused: what is missing, mixed, hostile, or in a layout that is not read."""

from __future__ import annotations

import json
import pickle  # noqa: TID251
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

from converter.errors import Refused
from converter.sources.dcp.source import SOURCE, adam_moments
from converter.sources.finding import find_place, kind_of
from dcp.broken import copied, edit, refused
from dcp.compare import RUNS, faults, live
from zero.compare import differences, evaluated


@pytest.mark.parametrize(
    ("code", "names"),
    [
        ("fsdp-rank-files", ["pytorch_model_fsdp_rank0.bin", "pytorch_model_fsdp_rank1.bin"]),
        ("fsdp-rank-files", ["pytorch_model_fsdp_0_rank0.bin"]),
        ("dcp-rank-metadata", ["__0.metadata", "__0_0.distcp"]),
        ("dcp-metadata-missing", ["__0_0.distcp", "__1_0.distcp"]),
    ],
)
def test_layouts_that_are_not_read_are_named(tmp_path: Path, code: str, names: list[str]) -> None:
    for name in names:
        (tmp_path / name).touch()
    assert kind_of(tmp_path) == "dcp"
    assert refused(tmp_path, code).next
    assert [f.code for f in SOURCE.survey(tmp_path).faults] == [code]


def test_a_missing_file_of_a_rank_is_named(tmp_path: Path) -> None:
    run = copied(tmp_path, "accelerate-ranks-n2")
    (run / "checkpoint-2" / "pytorch_model_fsdp_0_rank1.bin").unlink()
    error = refused(run, "fsdp-rank-files")
    assert "rank 1 of 2" in error.what


def test_plain_rows_of_one_rank_are_not_taken_for_the_model(tmp_path: Path) -> None:
    """Nothing but config.json says how large the whole is, and that there was another rank."""
    run = copied(tmp_path, "accelerate-ranks-n2")
    checkpoint = run / "checkpoint-2"
    for file in checkpoint.glob("*_rank*.bin"):
        file.unlink()
    state = live(run)
    torch.save(
        {n: t[: -(-len(t) // 2)].clone() for n, t in state.items()}, checkpoint / "pytorch_model_fsdp_0_rank0.bin"
    )
    assert "is asked for" in refused(run, "fsdp-rank-files").what
    torch.save(
        {n: t[-(-len(t) // 2) :].clone() for n, t in state.items()}, checkpoint / "pytorch_model_fsdp_0_rank1.bin"
    )
    assert differences(evaluated(SOURCE.open(run, asked="run").tensors), state) == []


def test_pieces_in_safetensors_come_without_an_optimizer() -> None:
    with pytest.raises(Refused) as caught:
        adam_moments(RUNS / "hf-shards-n2", which="exp_avg")
    assert caught.value.code == "dcp-no-moments"


def test_what_megatron_saved_is_left_to_the_source_for_it(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(RUNS / "nested-n4" / "step-2", tmp_path / "iter_0000002"))
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))
    for place in (folder, tmp_path):
        assert kind_of(place) == "megatron"
        assert find_place(place, "x").folder == folder
        assert SOURCE.find(place, "x") is None


def test_a_missing_file_is_named_with_what_is_lost(tmp_path: Path) -> None:
    run = copied(tmp_path, "odd-n3")
    (run / "step-2" / "__1_0.distcp").unlink()
    error = refused(run, "dcp-file-missing")
    assert "1 of 3 files are missing: __1_0.distcp" in error.what
    assert "pieces of 21 tensors are lost: f{16,32,64}.matrix.{0..1}" in error.what


def test_an_optimizers_file_is_not_needed_for_the_weights(tmp_path: Path) -> None:
    run = copied(tmp_path, "accelerate-n2")
    (run / "checkpoint-2" / "optimizer_0" / "__1_0.distcp").unlink()
    assert differences(evaluated(SOURCE.open(run, asked="x").tensors), live(run)) == []
    with pytest.raises(Refused) as caught:
        adam_moments(run, which="exp_avg")
    assert caught.value.code == "dcp-file-missing"


def test_files_of_two_saves_arerefused(tmp_path: Path) -> None:
    run = copied(tmp_path, "odd-n3")
    shutil.copy(run / "step-2" / "__2_0.distcp", run / "step-2" / "__1_0.distcp")
    with pytest.raises(Refused) as caught:
        SOURCE.open(run, asked="x")
    assert caught.value.code in ("dcp-record", "torch-zip", "torch-not", "file-truncated")


def test_chunks_that_leave_a_gap_overlap_or_have_no_place_arerefused(tmp_path: Path) -> None:
    name = "f32.matrix.0"

    def gap(metadata: Any) -> None:
        metadata.state_dict_metadata[name].chunks.pop(1)

    def longer(metadata: Any) -> None:
        metadata.state_dict_metadata[name].size = torch.Size((9, 5))

    def overlap(metadata: Any) -> None:
        entry = metadata.state_dict_metadata[name]
        entry.chunks[1] = ChunkStorageMetadata(torch.Size((2, 0)), entry.chunks[1].sizes)
        place = metadata.storage_data[MetadataIndex(name, (3, 0))]
        metadata.storage_data[MetadataIndex(name, (2, 0))] = place

    def lost(metadata: Any) -> None:
        del metadata.storage_data[MetadataIndex(name, (3, 0))]

    for change in (gap, longer, overlap, lost):
        run = copied(tmp_path / change.__name__, "odd-n3")
        edit(run / "step-2", change)
        assert name in refused(run, "dcp-chunks").what


def test_replicas_that_were_saved_twice_are_read_once(tmp_path: Path) -> None:
    run = copied(tmp_path, "odd-n3")

    def twice(metadata: Any) -> None:
        for entry in metadata.state_dict_metadata.values():
            entry.chunks += list(entry.chunks)

    edit(run / "step-2", twice)
    assert faults(run) == []


def test_metadata_of_older_torch_is_read(tmp_path: Path) -> None:
    run = copied(tmp_path, "nested-n4")

    def older(metadata: Any) -> None:
        del metadata.storage_meta, metadata.version
        for place in metadata.storage_data.values():
            place.__dict__.pop("transform_descriptors", None)

    edit(run / "step-2", older)
    assert faults(run) == []


def test_without_the_planners_paths_accelerates_prefix_is_known_and_others_stay(tmp_path: Path) -> None:
    run = copied(tmp_path, "accelerate-n2")
    for part in ("pytorch_model_fsdp_0", "optimizer_0"):
        edit(run / "checkpoint-2" / part, lambda m: setattr(m, "planner_data", None))
    assert faults(run) == []
    run = copied(tmp_path, "tp-n4")
    edit(run / "step-2", lambda m: setattr(m, "planner_data", None))
    assert faults(run) == []


def test_of_two_models_that_are_not_told_apart_none_is_taken(tmp_path: Path) -> None:
    run = copied(tmp_path, "nested-n4")

    def twins(metadata: Any) -> None:
        paths = metadata.planner_data
        for key in [k for k in paths if k.startswith("model.")]:
            new = key.replace("model.", "actor." if "0." in key else "critic.", 1)
            paths[new] = (new.partition(".")[0], paths.pop(key)[1])
            metadata.state_dict_metadata[new] = metadata.state_dict_metadata.pop(key)

    edit(run / "step-2", twins)
    error = refused(run, "dcp-several-models")
    assert "actor, critic" in error.what


def test_compressed_pieces_arerefused(tmp_path: Path) -> None:
    run = copied(tmp_path, "odd-n3")

    def compressed(metadata: Any) -> None:
        next(iter(metadata.storage_data.values())).transform_descriptors = ["stream.zstd/1"]

    edit(run / "step-2", compressed)
    assert "zstd" in refused(run, "dcp-transformed").what


def test_files_outside_of_the_folder_are_not_read(tmp_path: Path) -> None:
    run = copied(tmp_path, "odd-n3")

    def outside(metadata: Any) -> None:
        next(iter(metadata.storage_data.values())).relative_path = "../__0_0.distcp"

    edit(run / "step-2", outside)
    refused(run, "dcp-malformed")


def test_code_that_metadata_names_is_not_run_andrefused(tmp_path: Path) -> None:
    run = copied(tmp_path, "odd-n3")
    proof = tmp_path / "ran"

    class Attack:
        def __reduce__(self) -> Any:
            return Path.touch, (proof,)

    (run / "step-2" / ".metadata").write_bytes(pickle.dumps(Attack()))
    refused(run, "pickle-names")
    assert not proof.exists()


def test_a_survey_lists_tensors_and_never_raises(tmp_path: Path) -> None:
    found = SOURCE.survey(RUNS / "odd-n3")
    assert found.error() is None
    assert found.entries["f32.matrix.1"].info.shape == (7, 5)
    assert sorted(found.files) == [".metadata", "__0_0.distcp", "__1_0.distcp", "__2_0.distcp"]
    run = copied(tmp_path, "odd-n3")
    for path in sorted((run / "step-2").iterdir()):
        raw = path.read_bytes()
        path.write_bytes(raw[: len(raw) // 2])
        assert SOURCE.survey(run).error() is not None
        path.write_bytes(raw)
    assert SOURCE.survey(run).error() is None
