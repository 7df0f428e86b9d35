"""A `.distcp` file that was copied over another's: the same values in different pieces of the same tensors.

Replicas of shards (FSDP1, HYBRID_SHARD) leave files of ranks whose records lie at the same places.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from converter.examine.doctor import DoctorRequest, examine
from converter.sources.dcp.source import SOURCE
from dcp.broken import copied, refused
from dcp.compare import RUNS

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # one process saves

RUN = "fsdp1-hybrid-n4"
MODEL = "checkpoint-2/pytorch_model_fsdp_0"


@pytest.mark.parametrize(("source", "target"), [("__2_0", "__3_0"), ("__3_0", "__2_0")])
def test_a_copy_of_another_rank_s_file_is_refused_and_doctor_names_it(source: str, target: str, tmp_path: Path) -> None:
    run = copied(tmp_path, RUN)
    shutil.copy(run / MODEL / f"{source}.distcp", run / MODEL / f"{target}.distcp")
    what = refused(run, "dcp-record").what
    assert "__2_0.distcp" in what and "__3_0.distcp" in what and "copy" in what
    assert "dcp-record" in {f.code for f in examine(DoctorRequest(str(run / "checkpoint-2"))).findings}


def test_pieces_that_are_one_value_again_and_again_are_no_copies(tmp_path: Path) -> None:
    run = copied(tmp_path, RUN)
    folder = run / MODEL
    state = {
        k: torch.zeros(e.size) for k, e in dcp.FileSystemReader(folder).read_metadata().state_dict_metadata.items()
    }
    single = tmp_path / "zeros"
    dcp.save(state, storage_writer=dcp.FileSystemWriter(single, single_file_per_rank=False), no_dist=True)
    found = SOURCE.open(single, asked="zeros").tensors
    assert len(found) == len(state)


def test_the_run_itself_and_equal_tensors_of_two_names_are_read(tmp_path: Path) -> None:
    assert len(SOURCE.open(RUNS / RUN, asked=RUN).tensors) > 3
    one = torch.arange(96.0).reshape(8, 12)
    state = {"model": {"first.weight": one, "second.weight": one.clone(), "third.weight": one + 1}}
    dcp.save(state, storage_writer=dcp.FileSystemWriter(tmp_path / "twice", single_file_per_rank=False), no_dist=True)
    assert sorted(SOURCE.open(tmp_path / "twice", asked="x").tensors) == [
        "first.weight",
        "second.weight",
        "third.weight",
    ]
