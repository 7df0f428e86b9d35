"""Files of ranks under each other's names: pieces of equal length would be put together in the wrong order.

torch.save calls the archive in a file as the file was called, so that an exchange of two is seen. The runs are those
that DeepSpeed, verl and accelerate saved.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

import converter
from converter.errors import ConvertError
from converter.examine.doctor import DoctorRequest, examine
from converter.sources.finding import sources
from converter.sources.verl.source import SOURCE as VERL_SOURCE
from places import RUNS

ZERO, VERL, DCP = RUNS / "zero" / "runs", RUNS / "verl_saves" / "runs", RUNS / "dcp" / "runs"
WEIGHTS = [
    (ZERO / "lm-tied-z3-n2", "*zero_pp_rank_{}_*optim_states.pt", "zero-mixed"),
    (ZERO / "lora-frozen-head-z3-n2", "*zero_pp_rank_{}_*model_states.pt", "zero-mixed"),
    (ZERO / "lm-fp16-z1-n2", "*zero_pp_rank_{}_*optim_states.pt", "zero-mixed"),
    (VERL / "critic-fsdp1-n3", "model_*_rank_{}.pt", "verl-mixed"),
    (DCP / "accelerate-ranks-n2", "pytorch_model_fsdp_0_rank{}.bin", "fsdp-rank-files"),
]
MOMENTS = [
    (ZERO / "lm-fp16-z1-n2", "*zero_pp_rank_{}_*optim_states.pt", "zero-mixed"),
    (VERL / "critic-fsdp1-n3", "optim_*_rank_{}.pt", "verl-mixed"),
    (VERL / "actor-original-fsdp1-n2", "optim_*_rank_{}.pt", "verl-mixed"),
    (VERL / "actor-tied-fsdp2-n2", "optim_*_rank_{}.pt", "verl-mixed"),
    (DCP / "accelerate-ranks-n2", "optimizer_0_rank{}.bin", "fsdp-rank-files"),
]


def exchanged(run: Path, pattern: str, into: Path) -> Path:
    """A copy of a run in which two ranks' files have each other's names."""
    made = Path(shutil.copytree(run, into / "run"))
    one, other = (next(made.rglob(pattern.format(rank))) for rank in (0, 1))
    one.rename(made / "aside")
    other.rename(one)
    (made / "aside").rename(other)
    return made


@pytest.mark.parametrize(("run", "files", "code"), WEIGHTS, ids=lambda v: getattr(v, "name", None))
def test_weights_of_exchanged_files_are_refused_with_the_name_that_each_was_saved_under(
    run: Path, files: str, code: str, tmp_path: Path
) -> None:
    made = exchanged(run, files, tmp_path)
    source = sources()[{"z": "deepspeed", "v": "verl", "f": "dcp"}[code[0]]]
    with pytest.raises(ConvertError) as caught:
        source.open_masters(made, asked="x")
    assert (caught.value.code, "was saved as" in caught.value.what) == (code, True)


@pytest.mark.parametrize(("run", "files", "code"), MOMENTS, ids=lambda v: getattr(v, "name", None))
def test_moments_of_exchanged_files_are_refused(run: Path, files: str, code: str, tmp_path: Path) -> None:
    made = exchanged(run, files, tmp_path)
    with pytest.raises(ConvertError) as caught:
        converter.adam_moments(made, which="exp_avg")
    assert (caught.value.code, "was saved as" in caught.value.what) == (code, True)


def test_a_run_of_many_ranks_of_which_doctor_reads_the_first_alone_is_looked_through_for_exchanged_files(
    tmp_path: Path,
) -> None:
    made = exchanged(ZERO / "odd-z3-n11", "*zero_pp_rank_{}_*optim_states.pt", tmp_path)
    assert "zero-mixed" in {f.code for f in examine(DoctorRequest(str(made))).findings}


def test_a_rank_s_file_copied_over_another_s_is_refused(tmp_path: Path) -> None:
    made = Path(shutil.copytree(ZERO / "lm-tied-z3-n2", tmp_path / "run"))
    one, other = (next(made.rglob(f"*zero_pp_rank_{r}_*optim_states.pt")) for r in (0, 1))
    shutil.copyfile(one, other)
    with pytest.raises(ConvertError) as caught:
        converter.reshard_state(made, world_size=1)
    assert caught.value.code == "zero-mixed"


def test_a_state_in_an_archive_of_another_name_is_read(tmp_path: Path) -> None:
    """What an engine of its own wrote through an open file: torch calls such an archive `archive`."""
    run = VERL / "actor-tied-fsdp2-n2"
    made = Path(shutil.copytree(run, tmp_path / "run"))
    state = torch.load(run / "model_world_size_2_rank_1.pt", weights_only=False)  # noqa: TID251 - verl wrote it
    with (made / "model_world_size_2_rank_1.pt").open("wb") as raw:
        torch.save(state, raw)
    assert VERL_SOURCE.open(made, asked="x").tensors.keys() == VERL_SOURCE.open(run, asked="x").tensors.keys()


DAMAGED = [
    (VERL / "critic-fsdp2-n4", "optim_world_size_4_rank_3.pt"),
    (DCP / "accelerate-n2", "checkpoint-2/optimizer_0/__1_0.distcp"),
    (DCP / "accelerate-n2", "checkpoint-2/optimizer_0/.metadata"),
    (DCP / "accelerate-ranks-n2", "checkpoint-2/optimizer_0_rank1.bin"),
    (ZERO / "lm-fp16-z1-n2", "global_step2/zero_pp_rank_1_mp_rank_00_optim_states.pt"),
]


@pytest.mark.parametrize("harm", ["gone", "cut"])
@pytest.mark.parametrize(("run", "file"), DAMAGED, ids=lambda v: Path(v).name)
def test_doctor_names_an_optimizer_s_state_that_is_not_whole_beside_weights_that_are(
    run: Path, file: str, harm: str, tmp_path: Path
) -> None:
    made = Path(shutil.copytree(run, tmp_path / "run"))
    if harm == "gone":
        (made / file).unlink()
    else:
        os.truncate(made / file, (made / file).stat().st_size // 2)
    found = {f.code: f.severity for f in examine(DoctorRequest(str(made), resume_on=8)).findings}
    assert found["optimizer-damaged"] == "changes-numbers"
    assert found["resume-on"] == "error"


def test_moments_of_a_rank_of_another_step_are_refused(tmp_path: Path) -> None:
    made = Path(shutil.copytree(VERL / "critic-fsdp1-n3", tmp_path / "run"))
    state = torch.load(made / "optim_world_size_3_rank_1.pt", weights_only=False)  # noqa: TID251 - verl wrote it
    for own in state["state"].values():
        own["step"] += 1
    torch.save(state, made / "optim_world_size_3_rank_1.pt")
    with pytest.raises(ConvertError) as caught:
        converter.adam_moments(made, which="exp_avg_sq")
    assert (caught.value.code, "step" in caught.value.what) == ("verl-mixed", True)


def test_a_replica_of_another_step_is_refused_and_one_that_is_cut_short_is_not_needed(tmp_path: Path) -> None:
    """Four ranks in two replicas: files of the second hold what those of the first do."""
    made = Path(shutil.copytree(VERL / "critic-hsdp-fsdp2-n4", tmp_path / "run"))
    file = made / "model_world_size_4_rank_3.pt"
    state = torch.load(file, weights_only=False)  # noqa: TID251 - verl wrote it
    state["model.norm.weight"]._local_tensor.add_(1)
    torch.save(state, file)
    before = VERL_SOURCE.open(VERL / "critic-hsdp-fsdp2-n4", asked="x")
    with pytest.raises(ConvertError) as caught:
        VERL_SOURCE.open(made, asked="x")
    assert (caught.value.code, "model.norm.weight" in caught.value.what) == ("verl-mixed", True)
    os.truncate(file, 900)
    found = VERL_SOURCE.open(made, asked="x")
    assert found.tensors.keys() == before.tensors.keys()
    assert any("another replica" in text for text in found.said)
