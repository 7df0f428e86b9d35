"""A DeepSpeed run whose model file and optimizer files are of two saves is refused, and doctor names it.

Shapes, ranks and names are those of the run: only steps, learning rates and values tell.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from converter.cli import main
from converter.errors import Refused
from converter.examine.doctor import DoctorRequest, examine
from converter.sources.dcp import source as dcp
from converter.sources.deepspeed import universal
from converter.sources.deepspeed.source import SOURCE
from converter.sources.verl import source as verl
from places import RUNS
from shards import edit
from zero.compare import differences, evaluated

ZERO = RUNS / "zero"
OPTIMIZERS = "*optim_states.pt"
MODELS = "*model_states.pt"


def _copy(tmp_path: Path, run: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / run.name))


def _step_by(steps: int) -> Callable[[Any], None]:
    def change(state: Any) -> None:
        inner = state["optimizer_state_dict"]
        for entry in inner.get("optimizer_state_dict", inner.get("base_optimizer_state"))["state"].values():
            entry["step"] += steps

    return change


def _edit_all(run: Path, pattern: str, change: Callable[[Any], Any]) -> None:
    for path in (run / "global_step2").glob(pattern):
        edit(path, change)


def _findings(run: Path) -> set[str]:
    return {f.code for f in examine(DoctorRequest(str(run))).findings if f.severity != "cosmetic"}


def _expect_nothing_written(run: Path, *words: str) -> None:
    out = run.parent / "out"
    assert main([words[0], str(run), str(out), "-q", *words[1:]]) == 3
    assert not out.exists() and not list(run.parent.glob("out*"))


def test_optimizers_of_a_later_step_than_the_model_are_refused_in_stage_3(tmp_path: Path) -> None:
    run = _copy(tmp_path, ZERO / "runs" / "lm-tied-z3-n2")
    _edit_all(run, OPTIMIZERS, _step_by(1))
    with pytest.raises(Refused, match="are of step 3, the model file is of step 2") as caught:
        SOURCE.open(run, asked="x")
    assert caught.value.code == "zero-mixed"
    _expect_nothing_written(run, "gather")
    _expect_nothing_written(run, "reshard", "--world-size", "3")
    assert _findings(run) & {"zero-mixed", "gather-refused"}


def test_an_optimizer_that_began_anew_is_read_and_doctor_says_so(tmp_path: Path) -> None:
    run = _copy(tmp_path, ZERO / "runs" / "lm-tied-z3-n2")
    _edit_all(run, OPTIMIZERS, _step_by(-1))
    assert any("counted 1 steps and the run 2" in words for words in SOURCE.open(run, asked="x").said)
    assert "moments-older" in _findings(run)


@pytest.mark.parametrize(("rate", "is_refused"), [(0.01, False), (0.02, True)])
def test_of_an_earlier_optimizer_the_learning_rate_tells_whether_the_schedule_had_set_it(
    rate: float, is_refused: bool, tmp_path: Path
) -> None:
    run = _copy(tmp_path, ZERO / "runs" / "lm-tied-z3-n2")
    _edit_all(run, OPTIMIZERS, _step_by(-1))
    _edit_all(run, MODELS, lambda state: state.update(lr_scheduler={"_last_lr": [rate]}))
    if is_refused:
        with pytest.raises(Refused, match="the schedule in the model file had set"):
            SOURCE.open(run, asked="x")
    else:
        assert SOURCE.open(run, asked="x").tensors


@pytest.mark.parametrize("name", ["roundrobin-z2-n3", "bf16-optimizer-z1-n2", "lm-fp16-z1-n2", "aligned-z1-n2"])
def test_masters_of_a_rank_that_are_not_the_module_s_weights_are_refused(name: str, tmp_path: Path) -> None:
    run = _copy(tmp_path, ZERO / "runs" / name)
    path = next((run / "global_step2").glob("*zero_pp_rank_1_*optim_states.pt"))

    def other(state: Any) -> None:
        for part in state["optimizer_state_dict"]["single_partition_of_fp32_groups"]:
            part.data *= 1.5

    edit(path, other)
    with pytest.raises(Refused, match="is not the weight in the model file") as caught:
        SOURCE.open_tag(run, asked="x", master=True)
    assert path.name in str(caught.value.where)
    with pytest.raises(Refused, match="is not the weight in the model file"):
        SOURCE.adam_moments(run, which="exp_avg")
    _expect_nothing_written(run, "reshard", "--world-size", "4")
    assert "optimizer-damaged" in _findings(run)


def test_without_masters_the_model_file_s_weights_are_whole(tmp_path: Path) -> None:
    run = _copy(tmp_path, ZERO / "runs" / "lm-fp16-z1-n2")
    _edit_all(run, OPTIMIZERS, _step_by(1))
    assert SOURCE.open(run, asked="x").tensors
    assert "optimizer-damaged" in _findings(run)


@pytest.mark.parametrize("file", ["fp32.pt", "exp_avg.pt"])
def test_a_parameter_of_another_save_in_a_universal_checkpoint_is_refused(file: str, tmp_path: Path) -> None:
    run = _copy(tmp_path, ZERO / "universal_runs" / "lora-z3-n2")
    path = next(p for p in sorted(run.rglob(file)) if "lora_A" in str(p.parent))

    def other(state: Any) -> None:
        (state["param"] if isinstance(state, dict) else state).data.mul_(1.5)

    edit(path, other)
    with pytest.raises(Refused, match="is not that of the save") as caught:
        universal.SOURCE.adam_moments(run, which="exp_avg")
    assert caught.value.code == "zero-mixed" and path.name in str(caught.value.where)
    assert _findings(run) & {"optimizer-damaged", "zero-mixed", "gather-refused"}


def test_files_that_a_larger_world_left_behind_go_into_no_new_rank_s(tmp_path: Path) -> None:
    run = _copy(tmp_path, ZERO / "runs" / "lm-tied-z3-n2")
    left = run / "global_step2" / "zero_pp_rank_2_mp_rank_00_model_states.pt"
    shutil.copy(ZERO / "runs" / "subgroups-z3-n3" / "global_step2" / left.name, left)
    edit(left, lambda state: state.update(global_steps=9))
    assert main(["reshard", str(run), str(tmp_path / "out"), "-q", "--world-size", "3"]) == 0
    assert SOURCE.open(tmp_path / "out", asked="x").origin.stored_format == "ZeRO-3, 3 ranks"
    whole = SOURCE.open(run, asked="x")
    assert differences(evaluated(SOURCE.open(tmp_path / "out", asked="x").tensors), evaluated(whole.tensors)) == []


@pytest.mark.parametrize("harm", ["missing", "later"])
def test_a_step_that_a_universal_checkpoint_lacks_or_has_of_another_save_is_named(harm: str, tmp_path: Path) -> None:
    run = _copy(tmp_path, ZERO / "universal_runs" / "roundrobin-aligned-z2-n3")
    path = sorted(run.rglob("step.pt"))[1]
    path.unlink() if harm == "missing" else torch.save(torch.tensor(3.0), path)
    with pytest.raises(Refused) as caught:
        universal.SOURCE.adam_moments(run, which="exp_avg")
    assert caught.value.code == ("zero-parameter-missing" if harm == "missing" else "zero-mixed")
    assert "optimizer-damaged" in _findings(run)


@pytest.mark.parametrize("name", ["lm-tied-z3-n2", "roundrobin-z2-n3"])
def test_an_optimizer_without_moments_is_another_one_and_not_a_damaged_one(name: str, tmp_path: Path) -> None:
    run = _copy(tmp_path, ZERO / "runs" / name)

    def without(state: Any) -> None:
        inner = state["optimizer_state_dict"]
        for entry in inner.get("optimizer_state_dict", inner.get("base_optimizer_state"))["state"].values():
            del entry["exp_avg"], entry["exp_avg_sq"]

    _edit_all(run, OPTIMIZERS, without)
    with pytest.raises(Refused, match="it isn't Adam") as caught:
        SOURCE.adam_moments(run, which="exp_avg")
    assert caught.value.code == "no-moments"
    assert "optimizer-damaged" not in _findings(run)


@pytest.mark.parametrize("name", ["lm-tied-z3-n2", "roundrobin-z2-n3", "bf16-optimizer-z1-n2"])
def test_ranks_with_other_learning_rates_are_of_two_saves(name: str, tmp_path: Path) -> None:
    run = _copy(tmp_path, ZERO / "runs" / name)

    def faster(state: Any) -> None:
        inner = state["optimizer_state_dict"]
        base = inner.get("optimizer_state_dict", inner.get("base_optimizer_state"))
        base["param_groups"][0]["lr"] *= 2

    edit(next((run / "global_step2").glob("*zero_pp_rank_1_*optim_states.pt")), faster)
    with pytest.raises(Refused, match=r"lr.* is 0.01 on rank 0, and 0.02 on rank 1") as caught:
        SOURCE.adam_moments(run, which="exp_avg")
    assert caught.value.code == "zero-mixed"
    _expect_nothing_written(run, "reshard", "--world-size", "4")
    assert _findings(run) & {"optimizer-damaged", "zero-mixed"}


def _faster(state: Any) -> None:
    state["param_groups"][0]["lr"] *= 2


def _later(state: Any) -> None:
    state["lr_scheduler"]["last_epoch"] += 1


@pytest.mark.parametrize(("files", "change"), [("optim", _faster), ("extra_state", _later)])
def test_verl_s_ranks_with_other_rates_or_schedules_are_of_two_saves(
    files: str, change: Callable[[Any], None], tmp_path: Path
) -> None:
    run = _copy(tmp_path, RUNS / "verl_saves" / "runs" / "critic-fsdp1-n3")
    for rank in range(3):
        path = run / f"extra_state_world_size_3_rank_{rank}.pt"
        torch.save({"lr_scheduler": {"last_epoch": 2, "_last_lr": [1e-3]}, "rng": None}, path)
    assert verl.SOURCE.adam_moments(run, which="exp_avg")
    path = run / f"{files}_world_size_3_rank_1.pt"
    state = torch.load(path, weights_only=False)  # noqa: TID251 - verl or this test wrote it
    change(state)
    torch.save(state, path)
    with pytest.raises(Refused, match="not of one save") as caught:
        verl.SOURCE.adam_moments(run, which="exp_avg")
    assert caught.value.code == "verl-mixed"
    _expect_nothing_written(run, "reshard", "--world-size", "2")
    assert "optimizer-damaged" in _findings(run)


def _another_step(state: Any) -> None:
    for entry in state["state"].values():
        entry["step"] += 1


@pytest.mark.parametrize("change", [_faster, _another_step])
def test_accelerate_s_ranks_of_two_saves_are_refused(change: Callable[[Any], None], tmp_path: Path) -> None:
    run = _copy(tmp_path, RUNS / "dcp" / "runs" / "accelerate-ranks-n2")
    (path,) = run.rglob("optimizer_0_rank1.bin")
    state = torch.load(path, weights_only=False)  # noqa: TID251 - accelerate wrote it
    change(state)
    torch.save(state, path)
    with pytest.raises(Refused) as caught:
        dcp.SOURCE.adam_moments(run, which="exp_avg")
    assert caught.value.code == "fsdp-rank-files"
    _expect_nothing_written(run, "reshard", "--world-size", "3")
    assert "optimizer-damaged" in _findings(run)


def test_accelerate_s_files_of_ranks_that_a_larger_world_left_are_not_read(tmp_path: Path) -> None:
    run = _copy(tmp_path, RUNS / "dcp" / "runs" / "accelerate-ranks-n2")
    before, own = _findings(run), dcp.SOURCE.adam_moments(run, which="exp_avg")
    for path in [*run.rglob("*_rank1.bin")]:
        shutil.copy(path, path.with_name(path.name.replace("rank1", "rank2")))
    assert _findings(run) == before
    assert dcp.SOURCE.adam_moments(run, which="exp_avg").keys() == own.keys()
