"""DeepSpeed's checkpoints, as real DeepSpeed saved them: gathered bit by bit, or refused with what is lost."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from converter.core.tensors.byte_runs import byte_runs
from converter.errors import ConvertError, Refused, UsageError
from converter.sources.deepspeed.source import SOURCE, adam_moments, open_tag
from converter.sources.finding import kind_of
from shards import edit
from zero.compare import RUNS, differences, evaluated, facts, faults, live, run_names


def _copy(tmp_path: Path, name: str) -> Path:
    return Path(shutil.copytree(RUNS / name, tmp_path / name))


def _refused(run: Path, code: str, *, master: bool = False, tag: str | None = None) -> ConvertError:
    with pytest.raises(ConvertError) as caught:
        open_tag(run, asked=str(run), master=master, tag=tag)
    assert caught.value.code == code, caught.value
    return caught.value


def test_the_fixtures_cover_every_stage_and_layout() -> None:
    known = [facts(RUNS / n) for n in run_names()]
    assert {f["stage"] for f in known} == {0, 1, 2, 3}
    assert {f["ranks"] for f in known} >= {1, 2, 3, 11}
    assert {f["case"] for f in known} >= {
        "aligned", "bf16-optimizer", "elastic", "lm-fp16", "lm-tied", "lora", "lora-frozen-head", "lora-lean", "odd",
        "plain", "reward", "roundrobin", "subgroups",
    }  # fmt: skip


@pytest.mark.parametrize("name", run_names())
def test_weights_buffers_masters_and_moments_equal_those_in_memory(name: str) -> None:
    assert faults(RUNS / name) == []


@pytest.mark.parametrize("name", [n for n in run_names() if facts(RUNS / n)["stage"] in (1, 2)])
def test_stages_1_and_2_copy_the_training_dtype_byte_for_byte(name: str) -> None:
    found = open_tag(RUNS / name, asked=name)
    assert all(byte_runs(t) is not None for t in found.tensors.values())


def test_masters_rounded_to_the_training_dtype_are_the_live_weights() -> None:
    run = RUNS / "roundrobin-z2-n3"
    masters = open_tag(run, asked="x", master=True)
    trained = masters.trained or frozenset()
    rounded = {n: t.bfloat16() if n in trained else t for n, t in evaluated(masters.tensors).items()}
    assert differences(rounded, live(run)) == []


def test_shared_parameters_are_one_tie_and_both_names_are_there() -> None:
    found = open_tag(RUNS / "lm-tied-z3-n2", asked="x")
    assert found.ties == (("model.embed_tokens.weight", "lm_head.weight"),)
    assert found.tensors["lm_head.weight"] == found.tensors["model.embed_tokens.weight"]


def test_the_tag_its_parent_and_the_runs_folder_are_one_checkpoint(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    checkpoint = Path(shutil.copytree(RUNS / "lm-tied-z3-n2", run / "checkpoint-2"))
    (run / "tokenizer.json").write_text("{}")
    places = [checkpoint / "global_step2", checkpoint, run]
    found = [open_tag(p, asked=str(p)) for p in places]
    assert len({f.origin.header_digest for f in found}) == 1
    assert all(f.config["model_type"] == "llama" for f in found)
    assert all("tokenizer.json" in f.side_files for f in found)
    assert "`latest` says so" in found[1].said[0]
    assert [kind_of(p) for p in places[:2]] == ["deepspeed", "deepspeed"]


def test_latest_is_obeyed_and_a_tag_overrules_it(tmp_path: Path) -> None:
    run = _copy(tmp_path, "odd-z3-n11")
    shutil.copytree(RUNS / "subgroups-z3-n3" / "global_step2", run / "global_step10")
    assert open_tag(run, asked="x").origin.stored_format == "ZeRO-3, 11 ranks"
    assert open_tag(run, asked="x", tag="global_step10").origin.stored_format == "ZeRO-3, 3 ranks"
    assert "global_step2, global_step10" in str(_refused(run, "no-such-tag", tag="global_step3").expected)
    (run / "latest").write_text("global_step7")
    assert "global_step7" in _refused(run, "zero-latest").what
    (run / "latest").write_text("../elsewhere")
    _refused(run, "zero-latest")
    (run / "latest").unlink()
    assert isinstance(_refused(run, "several-checkpoints"), UsageError)
    shutil.rmtree(run / "global_step10")
    assert "the only one" in open_tag(run, asked="x").said[0]


def test_old_file_names_are_read(tmp_path: Path) -> None:
    run = _copy(tmp_path, "subgroups-z3-n3")
    for path in (run / "global_step2").iterdir():
        path.rename(path.with_name(path.name.replace("_optim_states", "optim_states").replace("bf16_", "")))
    assert faults(run) == []


def test_files_without_alignment_paddings_and_with_one_mapping_of_shapes_are_those_of_old_versions(
    tmp_path: Path,
) -> None:
    run = _copy(tmp_path, "bf16-optimizer-z1-n2")
    path = run / "global_step2" / "mp_rank_00_model_states.pt"
    edit(path, lambda state: state.update(param_shapes=state["param_shapes"][0]))
    assert faults(run) == []


@pytest.mark.parametrize("rank", [0, 1])
def test_stage_3_without_a_rank_is_refused_with_what_is_lost(tmp_path: Path, rank: int) -> None:
    run = _copy(tmp_path, "lora-z3-n2")
    (run / "global_step2" / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").unlink()
    error = _refused(run, "zero-rank-missing")
    assert f"rank {rank} of 2" in error.what
    assert "1/2 of every trained parameter" in error.what


def test_stage_3_without_a_model_file_loses_frozen_fragments_only_where_there_are_any(tmp_path: Path) -> None:
    run = _copy(tmp_path, "lora-z3-n2")
    (run / "global_step2" / "zero_pp_rank_1_mp_rank_00_model_states.pt").unlink()
    assert "frozen" in _refused(run, "zero-rank-missing").what
    run = _copy(tmp_path, "lm-tied-z3-n2")
    (run / "global_step2" / "zero_pp_rank_1_mp_rank_00_model_states.pt").unlink()
    assert faults(run) == []
    assert any("rank 1 are missing" in said for said in open_tag(run, asked="x").said)
    (run / "global_step2" / "zero_pp_rank_0_mp_rank_00_model_states.pt").unlink()
    _refused(run, "zero-model-file")


def test_stages_1_and_2_without_a_rank_keep_the_weights_and_lose_the_masters(tmp_path: Path) -> None:
    run = _copy(tmp_path, "roundrobin-z2-n3")
    (run / "global_step2" / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    assert differences(evaluated(open_tag(run, asked="x").tensors), live(run)) == []
    assert "rank 1 of 3" in _refused(run, "zero-rank-missing", master=True).what
    with pytest.raises(Refused, match="rank 1 of 3"):
        adam_moments(run, which="exp_avg")
    for path in (run / "global_step2").glob("*optim_states.pt"):
        path.unlink()
    assert differences(evaluated(open_tag(run, asked="x").tensors), live(run)) == []
    _refused(run, "zero-no-masters", master=True)


def test_files_left_over_from_more_ranks_are_named_and_not_read(tmp_path: Path) -> None:
    run = _copy(tmp_path, "lm-tied-z3-n2")
    other = RUNS / "subgroups-z3-n3" / "global_step2"
    for name in ("bf16_zero_pp_rank_2_mp_rank_00_optim_states.pt", "zero_pp_rank_2_mp_rank_00_model_states.pt"):
        shutil.copy(other / name, run / "global_step2" / name)
    assert faults(run) == []
    assert any("more than 2 ranks" in said for said in open_tag(run, asked="x").said)


def test_files_of_two_runs_are_refused(tmp_path: Path) -> None:
    run = _copy(tmp_path, "lm-tied-z3-n2")
    name = "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    shutil.copy(RUNS / "subgroups-z3-n3" / "global_step2" / name, run / "global_step2" / name)
    assert "3 partitions" in _refused(run, "zero-mixed").what
    shutil.copy(RUNS / "lora-z3-n2" / "global_step2" / name, run / "global_step2" / name)
    _refused(run, "zero-sizes")
    shutil.copy(RUNS / "reward-z2-n2" / "global_step2" / "mp_rank_00_model_states.pt", run / "global_step2")
    _refused(run, "zero-mixed")


def test_files_of_two_steps_are_refused(tmp_path: Path) -> None:
    run = _copy(tmp_path, "subgroups-z3-n3")

    def later(state: Any) -> None:
        for entry in state["optimizer_state_dict"]["optimizer_state_dict"]["state"].values():
            entry["step"] += 1

    edit(run / "global_step2" / "bf16_zero_pp_rank_2_mp_rank_00_optim_states.pt", later)
    assert "rank 2: step 3" in _refused(run, "zero-mixed").what
    run = _copy(tmp_path, "lm-tied-z3-n2")
    path = run / "global_step2" / "zero_pp_rank_1_mp_rank_00_model_states.pt"
    edit(path, lambda state: state.update(global_steps=9))
    assert "step 9" in _refused(run, "zero-mixed").what


def test_a_stretch_that_is_too_short_is_refused(tmp_path: Path) -> None:
    for name, key in (("subgroups-z3-n3", "fp32_flat_groups"), ("elastic-z2-n3", "single_partition_of_fp32_groups")):
        run = _copy(tmp_path, name)

        def cut(state: Any, key: str = key) -> None:
            groups = state["optimizer_state_dict"][key]
            groups[0] = groups[0][:-1].clone()

        edit(run / "global_step2" / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt", cut)
        _refused(run, "zero-sizes", master=True)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("module", None),
        ("module", [1]),
        ("param_shapes", None),
        ("param_shapes", [{"a": "b"}]),
        ("param_shapes", [{"a": torch.Size([2])}, {"a": torch.Size([2])}]),
        ("shared_params", {"a": 3}),
        ("shared_params", {"new": "nowhere"}),
        ("frozen_param_shapes", {"a": torch.Size([5])}),
        ("dp_world_size", 7),
    ],
)
def test_client_state_that_shadows_deepspeeds_own_keys_is_refused(tmp_path: Path, key: str, value: Any) -> None:
    run = _copy(tmp_path, "subgroups-z3-n3")
    edit(run / "global_step2" / "zero_pp_rank_0_mp_rank_00_model_states.pt", lambda s: s.update({key: value}))
    with pytest.raises(Refused) as caught:
        open_tag(run, asked="x")
    assert caught.value.code in ("zero-malformed", "zero-sizes", "zero-mixed", "zero-rank-missing")


def test_user_state_of_any_class_is_data(tmp_path: Path) -> None:
    run = _copy(tmp_path, "lm-tied-z3-n2")
    client = {"note": __import__("argparse").Namespace(x=1), "losses": [torch.ones(2)]}
    for rank in (0, 1):
        path = run / "global_step2" / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt"
        edit(path, lambda state: state.update(client))
    assert faults(run) == []


_FOREIGN = {
    "zero-offloaded": ["offloaded_tensors/rank00/x.swp", "zero_pp_rank_0_mp_rank_00_model_states.pt"],
}


@pytest.mark.parametrize("code", _FOREIGN)
def test_other_layouts_are_recognised_and_the_tool_that_can_is_named(tmp_path: Path, code: str) -> None:
    for name in _FOREIGN[code]:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert kind_of(tmp_path) in ("deepspeed", "unread")
    error = _refused(tmp_path, code)
    assert error.next
    assert [f.code for f in SOURCE.survey(tmp_path).faults] == [code]


def test_a_survey_lists_tensors_and_never_raises(tmp_path: Path) -> None:
    found = SOURCE.survey(RUNS / "subgroups-z3-n3")
    assert found.error() is None
    assert found.entries["last.weight"].info.shape == (13, 7)
    assert len(found.files) == 6
    run = _copy(tmp_path, "subgroups-z3-n3")
    for path in (run / "global_step2").iterdir():
        path.write_bytes(path.read_bytes()[:2000])
        assert SOURCE.survey(run).error() is not None


def test_a_folder_with_weights_is_not_taken_for_shards(tmp_path: Path) -> None:
    run = _copy(tmp_path, "lm-tied-z3-n2")
    (run / "model.safetensors").touch()
    assert SOURCE.detect(run) is None
    assert SOURCE.detect(run / "global_step2")
    assert SOURCE.detect(tmp_path) is None
