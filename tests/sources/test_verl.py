"""verl's checkpoints, as verl's own checkpoint manager saved them: gathered bit by bit, or refused by what is lost."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from converter.core.tensors.byte_runs import byte_runs
from converter.errors import ConvertError, UsageError
from converter.sources.finding import find_place, kind_of
from converter.sources.verl.source import SOURCE
from verl_saves.compare import RUNS, facts, live, moment_faults, run_names, weight_faults
from zero.compare import differences, evaluated

WITH_OPTIMIZER = [n for n in run_names() if list((RUNS / n).glob("optim_world_size_*"))]


def _copy(tmp_path: Path, name: str, to: str | None = None) -> Path:
    return Path(shutil.copytree(RUNS / name, tmp_path / (to or name)))


def _refused(run: Path, code: str) -> ConvertError:
    with pytest.raises(ConvertError) as caught:
        SOURCE.open(run, asked=str(run))
    assert caught.value.code == code, caught.value
    return caught.value


def _edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a rank's file with torch itself, which reads DTensors without a process group."""
    state = torch.load(path, weights_only=False)  # noqa: TID251
    change(state)
    torch.save(state, path)


def _model(run: Path, rank: int) -> Path:
    (found,) = run.glob(f"model_world_size_*_rank_{rank}.pt")
    return found


def test_the_fixtures_cover_both_kinds_of_fsdp_and_every_number_of_ranks() -> None:
    known = [facts(RUNS / n) for n in run_names()]
    assert {(f["fsdp"], f["replicas"]) for f in known} == {(1, 1), (2, 1), (1, 2), (2, 2)}
    assert {f["ranks"] for f in known} == {1, 2, 3, 4}
    assert {f["dtype"] for f in known} == {"fp32", "bf16"}
    assert {f["case"] for f in known} >= {
        "actor", "actor-original", "actor-tied", "critic", "critic-buffers", "critic-hsdp", "lora", "lora-critic",
        "lora-only",
    }  # fmt: skip


@pytest.mark.parametrize("name", run_names())
def test_weights_and_buffers_equal_those_in_memory(name: str) -> None:
    assert weight_faults(RUNS / name) == []


@pytest.mark.parametrize("name", WITH_OPTIMIZER)
def test_both_moments_equal_those_in_memory(name: str) -> None:
    assert moment_faults(RUNS / name) == []


@pytest.mark.parametrize("name", run_names())
def test_weights_are_copied_byte_for_byte(name: str) -> None:
    assert all(byte_runs(t) is not None for t in SOURCE.open(RUNS / name, asked=name).tensors.values())


def test_fp32_stays_fp32_where_verls_own_merger_rounds_to_bf16() -> None:
    run = RUNS / "actor-whole-fsdp2-n2"
    merged = load_file(run / "merged-by-verl.safetensors")
    found = evaluated(SOURCE.open(run, asked="x").tensors)
    assert {t.dtype for t in merged.values()} == {torch.bfloat16}
    assert {t.dtype for t in found.values()} == {torch.float32}
    assert differences({n: t.bfloat16() for n, t in found.items()}, merged) == []
    assert any(not torch.equal(t, merged[n].float()) for n, t in found.items())


def test_weights_in_huggingface_are_those_of_the_shards_under_a_config_that_is_corrected() -> None:
    run = RUNS / "actor-whole-fsdp2-n2"
    found = SOURCE.open(run, asked="x")
    assert any("huggingface/ holds weights too" in said for said in found.said)
    assert differences(evaluated(found.tensors), load_file(run / "huggingface" / "model.safetensors")) == []
    assert json.loads((run / "huggingface" / "config.json").read_text())["dtype"] == "bfloat16"
    assert found.config["dtype"] == "float32"
    assert any("another dtype" in said for said in found.said)


def test_a_bf16_run_has_no_other_masters_and_says_so() -> None:
    run = RUNS / "actor-bf16-fsdp1-n2"
    masters = SOURCE.open_masters(run, asked="x")
    assert differences(evaluated(masters.tensors), live(run)) == []
    assert any("kept no fp32 masters" in said for said in masters.said)
    assert not any("masters" in said for said in SOURCE.open_masters(RUNS / "actor-fsdp1-n1", asked="x").said)


def test_a_shared_parameter_of_fsdp2_is_a_tie() -> None:
    found = SOURCE.open(RUNS / "actor-tied-fsdp2-n2", asked="x")
    assert found.ties == (("model.embed_tokens.weight", "lm_head.weight"),)


def test_trailing_ranks_may_have_nothing_of_a_tensor() -> None:
    run = RUNS / "critic-fsdp2-n4"
    sizes = [torch.load(_model(run, r), weights_only=False)["score.weight"].to_local().numel() for r in range(4)]  # noqa: TID251
    assert sizes == [12, 0, 0, 0]
    assert SOURCE.open(run, asked="x").tensors["score.weight"].info.shape == (1, 12)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_missing_rank_is_refused_with_what_is_lost(tmp_path: Path, rank: int) -> None:
    run = _copy(tmp_path, "critic-fsdp1-n3")
    _model(run, rank).unlink()
    error = _refused(run, "verl-rank-missing")
    assert f"rank {rank} of 3 are missing" in error.what
    assert "model.layers.0" in error.what
    assert "nothing else holds these values" in str(error.next)


@pytest.mark.parametrize("name", ["critic-hsdp-fsdp1-n4", "critic-hsdp-fsdp2-n4"])
@pytest.mark.parametrize("gone", [(2,), (0,), (0, 1), (2, 3), (0, 3)])
def test_of_replicas_one_whole_one_is_enough(tmp_path: Path, name: str, gone: tuple[int, ...]) -> None:
    run = _copy(tmp_path, name)
    for rank in gone:
        _model(run, rank).unlink()
    if gone == (0, 3):  # of either replica a shard
        assert "rank 0, 3 of 4" in _refused(run, "verl-rank-missing").what
        return
    assert weight_faults(run) == []
    assert any("another replica has all" in said for said in SOURCE.open(run, asked="x").said)


def test_of_replicas_the_files_of_one_are_read() -> None:
    found = SOURCE.open(RUNS / "critic-hsdp-fsdp2-n4", asked="x")
    assert sorted(Path(p).name for p in found.inputs if p.endswith(".pt")) == [
        "model_world_size_4_rank_0.pt", "model_world_size_4_rank_1.pt",
    ]  # fmt: skip


def test_meshes_are_read_as_torch_before_2_9_saved_them(tmp_path: Path) -> None:
    """Those had a tensor of ranks instead of a layout, and lists instead of tuples."""

    def older(state: dict[str, Any]) -> None:
        for value in state.values():
            mesh = value._spec.mesh
            if "mesh" not in mesh.__dict__:
                mesh.__dict__["mesh"] = mesh._rank_map.reshape(2, 2)
                mesh.__dict__["_coordinate_on_dim"] = list(mesh._coordinate_on_dim)
                del mesh.__dict__["_layout"]

    run = _copy(tmp_path, "critic-hsdp-fsdp2-n4")
    for rank in range(4):
        _edit(_model(run, rank), older)
    assert weight_faults(run) == []
    assert len([p for p in SOURCE.open(run, asked="x").inputs if p.endswith(".pt")]) == 2


def test_a_mesh_of_unknown_form_costs_reading_all_replicas(tmp_path: Path) -> None:
    def nameless(state: dict[str, Any]) -> None:
        for value in state.values():
            value._spec.mesh.__dict__.pop("_layout", None)

    run = _copy(tmp_path, "critic-hsdp-fsdp1-n4")
    for rank in range(4):
        _edit(_model(run, rank), nameless)
    assert weight_faults(run) == []
    assert len([p for p in SOURCE.open(run, asked="x").inputs if p.endswith(".pt")]) == 4
    _model(run, 1).unlink()
    assert weight_faults(run) == []
    _model(run, 2).unlink()
    assert "rank 1, 2 of 4" in _refused(run, "verl-rank-missing").what


def test_without_fsdp_config_the_names_tell_how_many_ranks_there_were(tmp_path: Path) -> None:
    run = _copy(tmp_path, "critic-fsdp1-n3")
    (run / "fsdp_config.json").unlink()
    assert weight_faults(run) == []
    _model(run, 2).unlink()
    _refused(run, "verl-rank-missing")


def test_files_of_two_runs_are_told_apart_by_fsdp_config_and_refused_without(tmp_path: Path) -> None:
    run = _copy(tmp_path, "critic-fsdp1-n3")
    for path in (RUNS / "critic-fsdp2-n4").glob("model_world_size_*"):
        shutil.copy(path, run)
    assert weight_faults(run) == []
    assert any("not read: model_world_size_4_rank_{0..3}.pt" in said for said in SOURCE.open(run, asked="x").said)
    (run / "fsdp_config.json").unlink()
    assert "3 and 4 ranks" in _refused(run, "verl-mixed").what
    (run / "fsdp_config.json").write_text('{"FSDP_version": 1, "world_size": 8}')
    assert "8 ranks" in _refused(run, "verl-mixed").what


def test_a_rank_that_was_copied_is_refused(tmp_path: Path) -> None:
    run = _copy(tmp_path, "critic-fsdp1-n3")
    shutil.copy(_model(run, 0), _model(run, 1))
    assert "was saved as" in _refused(run, "verl-mixed").what


def test_a_rank_of_another_model_is_refused(tmp_path: Path) -> None:
    run = _copy(tmp_path, "actor-tied-fsdp1-n2")
    shutil.copy(_model(RUNS / "lora-fsdp1-n2", 1), _model(run, 1))
    assert "hold different tensors" in _refused(run, "verl-mixed").what
    shutil.copy(_model(RUNS / "actor-bf16-fsdp1-n2", 1), _model(run, 1))
    assert "BF16" in _refused(run, "verl-mixed").what


def test_a_rank_more_than_there_were_is_refused(tmp_path: Path) -> None:
    run = _copy(tmp_path, "critic-fsdp1-n3")
    shutil.copy(_model(run, 0), run / "model_world_size_3_rank_3.pt")
    assert "no such rank among 3" in _refused(run, "verl-mixed").what


def test_buffers_are_whole_in_every_rank_and_must_be_equal(tmp_path: Path) -> None:
    run = _copy(tmp_path, "critic-buffers-fsdp1-n2")
    found = SOURCE.open(run, asked="x").tensors
    assert (found["mean"].info.shape, found["steps"].info.shape) == ((7,), ())
    _edit(_model(run, 1), lambda state: state["steps"].add_(1))
    assert "steps is not a shard" in _refused(run, "verl-mixed").what


def test_a_piece_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    def cut(state: dict[str, Any]) -> None:
        old = state["model.norm.weight"]
        state["model.norm.weight"] = DTensor(old.to_local()[:-1].clone(), old._spec, requires_grad=False)

    run = _copy(tmp_path, "critic-fsdp1-n3")
    _edit(_model(run, 1), cut)
    assert "model.norm.weight" in _refused(run, "verl-sizes").what


@pytest.mark.parametrize("kind", ["partial", "twice"])
def test_other_placements_are_refused(tmp_path: Path, kind: str) -> None:
    from torch.distributed.tensor._dtensor_spec import DTensorSpec
    from torch.distributed.tensor.placement_types import Partial, Shard

    def place(state: dict[str, Any]) -> None:
        old = state["score.weight"]
        placements = (Partial(), Shard(0)) if kind == "partial" else (Shard(1), Shard(0))
        spec = DTensorSpec(old._spec.mesh, placements, old._spec.tensor_meta)
        state["score.weight"] = DTensor(old.to_local(), spec, requires_grad=False)

    run = _copy(tmp_path, "critic-hsdp-fsdp2-n4")
    _edit(_model(run, 0), place)
    assert "score.weight is placed as" in _refused(run, "verl-placement").what


def test_a_file_that_would_run_code_is_refused_by_name(tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> Any:
            return eval, ("1/0",)

    run = _copy(tmp_path, "critic-fsdp1-n3")
    torch.save({"x": Attack()}, _model(run, 1))
    assert "eval" in _refused(run, "pickle-names").what


def test_moments_are_read_through_the_python_api(tmp_path: Path) -> None:
    from converter import adam_moments

    found = adam_moments(_run(tmp_path), which="exp_avg", part="critic", allow=["moments-order"])
    assert differences(evaluated(found), live(RUNS / "critic-fsdp1-n3", "exp_avg")) == []


def test_moments_need_their_files_and_one_numbering(tmp_path: Path) -> None:
    run = _copy(tmp_path, "actor-tied-fsdp2-n2")
    optim = run / "optim_world_size_2_rank_1.pt"
    _edit(optim, lambda state: state["param_groups"].append({"params": [99]}))
    with pytest.raises(ConvertError, match="one group of numbered parameters"):
        SOURCE.adam_moments(run, which="exp_avg")
    optim.unlink()
    with pytest.raises(ConvertError, match="rank 1 of 2 are missing"):
        SOURCE.adam_moments(run, which="exp_avg")


def test_moments_of_modules_that_were_wrapped_otherwise_are_refused(tmp_path: Path) -> None:
    run = _copy(tmp_path, "actor-bf16-fsdp1-n2")

    def longer(state: dict[str, Any]) -> None:
        state["state"][1]["exp_avg"] = torch.cat([state["state"][1]["exp_avg"], torch.zeros(1).bfloat16()])

    for rank in range(2):
        _edit(run / f"optim_world_size_2_rank_{rank}.pt", longer)
    with pytest.raises(ConvertError, match="nothing shows which"):
        SOURCE.adam_moments(run, which="exp_avg")


def _run(tmp_path: Path) -> Path:
    """A run's folder as verl's PPO trainer lays it out."""
    root = tmp_path / "run"
    for step in (9, 10):
        for part, name in (("actor", "actor-tied-fsdp1-n2"), ("critic", "critic-fsdp1-n3")):
            shutil.copytree(RUNS / name, root / f"global_step_{step}" / part)
        (root / f"global_step_{step}" / "data.pt").write_bytes(b"")
    (root / "latest_checkpointed_iteration.txt").write_text("9")
    return root


def test_a_run_its_step_and_its_part_are_one_place(tmp_path: Path) -> None:
    root = _run(tmp_path)
    actor = root / "global_step_9" / "actor"
    place = find_place(root, "run", part="actor")
    assert place.folder == actor
    assert "latest_checkpointed_iteration.txt says so (global_step_10 came later)" in place.why
    assert "the actor, asked for with --part" in place.why
    for part in ("actor", "policy"):
        assert find_place(root / "global_step_9", "x", part=part).folder == actor
    for part in ("critic", "value"):
        assert find_place(root, "x", part=part, tag="10").folder == root / "global_step_10" / "critic"
    assert find_place(actor, "x", part="actor").folder == actor
    assert find_place(actor / "huggingface", "x").folder == actor
    assert [kind_of(p) for p in (root, actor.parent, actor)] == ["verl", "verl", "verl"]
    assert SOURCE.open_part(root, asked="x", part="critic").origin.stored_format == "verl FSDP, 3 ranks"
    shutil.rmtree(root / "global_step_10" / "critic")
    assert "the only part" in find_place(root, "x", tag="global_step_10").why


@pytest.mark.parametrize(
    ("wish", "code", "words"),
    [
        ({}, "several-parts", "actor, critic"),
        ({"part": "reward"}, "no-such-part", "actor, critic"),
        ({"part": "actor", "tag": "11"}, "no-such-tag", "global_step_9, global_step_10"),
    ],
)
def test_what_is_not_said_is_asked_for(tmp_path: Path, wish: dict[str, str], code: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        find_place(_run(tmp_path), "run", **wish)
    assert caught.value.code == code
    assert words in str(caught.value.expected)


def test_a_part_named_by_its_folder_is_no_other(tmp_path: Path) -> None:
    actor = _run(tmp_path) / "global_step_9" / "actor"
    with pytest.raises(UsageError, match="not the critic"):
        find_place(actor, "x", part="critic")
    with pytest.raises(UsageError, match="is the step global_step_9"):
        find_place(actor, "x", tag="global_step_10")


def test_a_tracker_that_names_no_step_is_refused_and_without_one_a_step_is_asked_for(tmp_path: Path) -> None:
    root = _run(tmp_path)
    tracker = root / "latest_checkpointed_iteration.txt"
    for text in ("11", "9\n/../..", ""):
        tracker.write_text(text)
        with pytest.raises(ConvertError) as caught:
            find_place(root, "x", part="actor")
        assert caught.value.code == "verl-latest"
    tracker.unlink()
    with pytest.raises(UsageError) as caught_usage:
        find_place(root, "x", part="actor")
    assert caught_usage.value.code == "several-checkpoints"
    shutil.rmtree(root / "global_step_10")
    assert "the only step" in find_place(root, "x", part="actor").why


def test_fine_tuning_saves_shards_in_the_step_itself(tmp_path: Path) -> None:
    step = _copy(tmp_path, "actor-fsdp1-n1", "run/global_step_4")
    assert find_place(step.parent, "x").folder == step
    assert find_place(step.parent, "x", part="actor").folder == step
    assert find_place(step, "x", tag="4").folder == step
    with pytest.raises(UsageError, match="one model"):
        find_place(step, "x", part="critic")


def test_a_survey_lists_tensors_and_never_raises_on_content(tmp_path: Path) -> None:
    run = _copy(tmp_path, "critic-fsdp1-n3")
    found = SOURCE.survey(run)
    assert found.entries.keys() == live(run).keys()
    assert found.faults == []
    _model(run, 1).write_bytes(b"PK\3\4")
    assert [f.severity for f in SOURCE.survey(run).faults] == ["error"]


def test_a_recorded_world_that_is_no_number_is_not_believed(tmp_path: Path) -> None:
    run = _copy(tmp_path, "critic-fsdp1-n3")
    (run / "fsdp_config.json").write_text(json.dumps({"world_size": "3"}))
    assert weight_faults(run) == []
