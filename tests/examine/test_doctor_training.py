"""What runs leave behind: sound shards, shards that lack something, folders that are not finished, lone files."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from converter.examine.doctor import MOST_NEAR, DoctorRequest, case_of, examine
from converter.shipped import shipped
from converter.sources.deepspeed.source import SOURCE
from doctored import RUN, SIZES, codes, finding, serious
from places import RUNS

FIXTURES = shipped("fixtures")
ODD = RUNS / "zero" / "runs" / "odd-z3-n11"


def test_a_sound_run_says_that_gather_makes_it_loadable_and_that_it_is_the_sole_copy() -> None:
    found = finding(RUNS / "zero" / "runs" / "lora-z3-n2", "training-state")
    assert "sole copy of" in found.text
    assert str(found.next).startswith("rlhf-convert gather ")


def test_the_quick_survey_of_many_ranks_sees_what_the_whole_one_sees() -> None:
    quick, whole = SOURCE.survey_quickly(ODD), SOURCE.survey(ODD)
    assert {n: e.info for n, e in quick.entries.items()} == {n: e.info for n, e in whole.entries.items()}
    assert list(quick.entries) == list(whole.entries)
    assert quick.files == whole.files
    assert quick.faults == whole.faults == []


def test_of_many_ranks_only_the_first_one_s_pickles_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    from converter.core.formats import torch_container

    read: list[str] = []
    real = torch_container.read_container

    def counted(path: Path, **more: Any) -> Any:
        read.append(path.name)
        return real(path, **more)

    monkeypatch.setattr("converter.core.formats.torch_file.read_container", counted)
    case_of(DoctorRequest(str(ODD)))
    assert len(read) == 2
    assert all("rank_0_" in name for name in read)
    read.clear()
    case_of(DoctorRequest(str(ODD), deep=True))
    assert len(read) == 22


@pytest.mark.parametrize("name", ["*rank_7_*optim_states.pt", "*rank_0_*model_states.pt"])
def test_a_rank_that_is_missing_is_an_error(tmp_path: Path, name: str) -> None:
    folder = shutil.copytree(ODD, tmp_path / "run")
    next(folder.rglob(name)).unlink()
    assert serious(codes(folder)) == {"zero-rank-missing"}


def test_a_rank_s_file_that_is_cut_short_is_an_error_although_only_the_first_is_read_whole(tmp_path: Path) -> None:
    folder = shutil.copytree(ODD, tmp_path / "run")
    file = next(folder.rglob("*rank_7_*optim_states.pt"))
    os.truncate(file, file.stat().st_size // 2)
    assert serious(codes(folder)) == {"file-truncated"}


def test_a_rank_of_another_run_is_an_error(tmp_path: Path) -> None:
    folder = shutil.copytree(ODD, tmp_path / "run")
    other = next((RUNS / "zero" / "runs" / "lm-tied-z3-n2").rglob("*rank_1_*optim_states.pt"))
    shutil.copyfile(other, next(folder.rglob("*rank_7_*optim_states.pt")))
    assert serious(codes(folder)) == {"zero-mixed"}


def test_files_of_a_verl_rank_that_stayed_on_another_node_are_an_error(tmp_path: Path) -> None:
    folder = shutil.copytree(RUNS / "verl_saves" / "runs" / "critic-fsdp1-n3", tmp_path / "run")
    next(folder.rglob("model_world_size_3_rank_1.pt")).unlink()
    assert serious(codes(folder)) == {"verl-rank-missing"}


def test_files_of_a_distributed_checkpoint_that_are_missing_are_an_error(tmp_path: Path) -> None:
    folder = shutil.copytree(RUNS / "dcp" / "runs" / "nested-n4", tmp_path / "run")
    next(folder.rglob("__1_0.distcp")).unlink()
    assert serious(codes(folder)) == {"dcp-file-missing"}


def test_a_folder_with_a_config_and_shards_below_is_a_run_and_no_model_without_weights(tmp_path: Path) -> None:
    folder = shutil.copytree(RUN / "reward" / "checkpoint-2", tmp_path / "checkpoint-2")
    (folder / "model.safetensors").unlink()
    assert examine(DoctorRequest(str(folder))).case.kind == "training"
    assert serious(codes(folder)) == set()


def test_verl_s_huggingface_folder_without_weights_leads_to_its_shards(tmp_path: Path) -> None:
    folder = shutil.copytree(RUNS / "verl_saves" / "runs" / "actor-fsdp1-n1", tmp_path / "run")
    inner = next(p for p in folder.rglob("huggingface") if p.is_dir())
    found = finding(inner, "weights-missing")
    assert found.recoverability.startswith("from ")
    assert str(found.next).startswith("rlhf-convert gather ")


def test_shards_that_somebody_deleted_are_lost_with_the_weights_and_else_only_resuming_is(tmp_path: Path) -> None:
    folder = shutil.copytree(RUN / "reward" / "checkpoint-2", tmp_path / "checkpoint-2")
    assert serious(codes(folder)) == {"zero3-empty-tensors"}
    assert codes(folder)["sole-copy"] == "cosmetic"
    shutil.rmtree(folder / "global_step2")
    found = finding(folder, "shards-deleted")
    assert (found.severity, found.recoverability) == ("error", "lost")
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(folder)
    assert codes(folder) == {"shards-deleted": "cosmetic"}


def test_a_save_that_is_not_finished_is_recognised(causal: Path, tmp_path: Path) -> None:
    shutil.copytree(causal, tmp_path / "tmp-checkpoint-500")
    assert codes(tmp_path / "tmp-checkpoint-500") == {"being-written": "error"}
    shutil.copytree(causal, tmp_path / "OUT.partial")
    assert codes(tmp_path / "OUT.partial") == {"being-written": "error"}
    (causal / "model.safetensors.tmp").write_bytes(b"")
    assert codes(causal) == {"being-written": "cosmetic"}


def test_a_file_cut_short_a_moment_ago_may_be_under_way_and_one_of_long_ago_is_not(causal: Path) -> None:
    file = causal / "model.safetensors"
    os.truncate(file, file.stat().st_size - 100)
    assert codes(causal) == {"file-truncated": "error"}
    found = finding(causal, "file-truncated")
    assert "perhaps the save is under way" in found.text
    assert str(found.next).startswith("wait and look again; ")
    os.utime(file, (1, 1))
    assert "under way" not in finding(causal, "file-truncated").text


def test_a_run_s_folder_lists_its_checkpoints_and_the_next_command_looks_at_the_last(
    causal: Path, tmp_path: Path
) -> None:
    for step in (9, 10):
        shutil.copytree(causal, tmp_path / "run" / f"checkpoint-{step}")
    assert codes(tmp_path / "run") == {"run-folder": "cosmetic"}
    assert str(finding(tmp_path / "run", "run-folder").next) == f"rlhf-convert doctor {tmp_path}/run/checkpoint-10"


@pytest.mark.parametrize("name", ["rm_weights.safetensors", "rm.pt"])
def test_a_weight_file_without_a_config_is_told_with_what_is_in_it(tmp_path: Path, name: str) -> None:
    tensors = {"model.norm.weight": torch.ones(4), "score.weight": torch.ones(1, 4)}
    if name.endswith(".pt"):
        torch.save(tensors, tmp_path / name)
    else:
        save_file(tensors, tmp_path / name)
    report = examine(DoctorRequest(str(tmp_path)))
    assert report.case.kind == "weights"
    assert set(report.case.shapes) == set(tensors)
    assert {f.code for f in report.findings} == {"weights-alone"}
    alone = examine(DoctorRequest(str(tmp_path / name)))
    assert [(f.code, f.text) for f in alone.findings] == [(f.code, f.text) for f in report.findings]


def test_a_neighbour_s_run_is_not_recommended_as_a_source(tmp_path: Path) -> None:
    folder = shutil.copytree(RUN / "reward" / "checkpoint-2", tmp_path / "rm")
    shutil.rmtree(folder / "global_step2")
    shutil.copytree(RUN / "frozen" / "checkpoint-2", tmp_path / "somebody")
    assert finding(folder, "zero3-empty-tensors").recoverability == "lost"
    shutil.copytree(RUN / "reward" / "checkpoint-2" / "global_step2", tmp_path / "global_step2")
    assert finding(folder, "zero3-empty-tensors").recoverability == f"from {tmp_path}/global_step2"


def test_links_that_lead_in_circles_and_thousands_of_neighbours_do_no_harm(
    causal: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from converter.sources.finding import sources

    (causal / "loop").symlink_to(causal)
    (tmp_path / "lm-loop").symlink_to(tmp_path)
    (tmp_path / "checkpoint-1").symlink_to(tmp_path / "checkpoint-2")
    (tmp_path / "checkpoint-2").symlink_to(tmp_path / "checkpoint-1")
    for number in range(3000):
        (tmp_path / f"lm-{number}").mkdir()
    looked: list[Path] = []
    source = sources()["hf"]
    real = source.detect
    monkeypatch.setattr(source, "detect", lambda root: (looked.append(root), real(root))[1], raising=False)
    assert examine(DoctorRequest(str(causal))).findings == ()
    assert len(looked) <= MOST_NEAR + 2


def test_the_fixtures_that_are_shipped_are_sound_but_for_the_incident() -> None:
    for name in ("tiny-qwen2-base", "tiny-reward-adapter", "tiny-reward-run"):
        assert serious(codes(FIXTURES / name)) == set()
    assert serious(codes(FIXTURES / "tiny-reward-run" / "checkpoint-4")) == {"zero3-empty-tensors"}
