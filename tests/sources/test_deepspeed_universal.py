"""Universal checkpoints that DeepSpeed's ds_to_universal.py made: read bit by bit, or refused with what is wrong."""

from __future__ import annotations

import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import places
from converter.core.tensors.byte_runs import byte_runs
from converter.errors import ConvertError, Refused, UsageError
from converter.sources.deepspeed.universal import SOURCE
from converter.sources.finding import find_place, kind_of
from oracle.command import run as run_command
from zero.compare import RUNS, differences, evaluated, faults, live, run_names

UNIVERSAL = places.RUNS / "zero" / "universal_runs"
TAG = "global_step2_universal"
SCRAMBLED = "roundrobin-z2-n3"


def _copy(tmp_path: Path, name: str) -> Path:
    return Path(shutil.copytree(UNIVERSAL / name, tmp_path / name))


def _refused(run: Path, code: str, *, master: bool = False, tag: str | None = None) -> ConvertError:
    with pytest.raises(ConvertError) as caught:
        SOURCE.open_tag(run, asked=str(run), master=master, tag=tag)
    assert caught.value.code == code, caught.value
    return caught.value


def _edit(path: Path, change: Callable[[Any], Any]) -> None:
    """Change a file with torch itself; only files without DeepSpeed's own classes."""
    state = torch.load(path, weights_only=False)  # noqa: TID251
    torch.save(change(state), path)


@pytest.mark.parametrize("name", [n for n in run_names(UNIVERSAL) if n != SCRAMBLED])
def test_weights_buffers_masters_and_moments_equal_those_in_memory(name: str) -> None:
    assert faults(UNIVERSAL / name) == []


def test_frozen_weights_that_no_file_holds_stay_empty_placeholders(tmp_path: Path) -> None:
    run = _copy(tmp_path, "lora-z3-n2")
    for path in (run / TAG).glob("*_model_states.pt"):
        _edit(path, lambda state: {**state, "frozen_param_shapes": None, "frozen_param_fragments": None})
    found = SOURCE.open(run, asked="x")
    frozen = {n: t.info.shape for n, t in found.tensors.items() if n not in (found.trained or ())}
    assert frozen["base_model.model.model.layers.0.self_attn.k_proj.weight"] == (0,)
    assert set(frozen.values()) == {(0,)}


def test_a_round_robin_runs_weights_are_exact_and_its_masters_and_moments_are_refused() -> None:
    run = UNIVERSAL / SCRAMBLED
    found = SOURCE.open(run, asked="x")
    assert differences(evaluated(found.tensors), live(run)) == []
    assert all(byte_runs(t) is not None for t in found.tensors.values())
    error = _refused(run, "zero-round-robin", master=True)
    assert "round_robin_gradients on 3 ranks" in error.what and "rank files" in str(error.next)
    for which in ("exp_avg", "exp_avg_sq"):
        with pytest.raises(Refused) as caught:
            SOURCE.adam_moments(run, which=which)
        assert caught.value.code == "zero-round-robin"


def test_the_refused_masters_of_round_robin_are_indeed_those_of_other_parameters() -> None:
    zero = UNIVERSAL / SCRAMBLED / TAG / "zero"
    masters = live(UNIVERSAL / SCRAMBLED, "master")
    stored = {n: torch.load(zero / n / "fp32.pt")["param"] for n in masters}  # noqa: TID251
    assert sum(not stored[n].equal(masters[n]) for n in masters) > len(masters) // 2


def test_without_deepspeeds_settings_the_order_of_parameters_tells_of_round_robin(tmp_path: Path) -> None:
    run = _copy(tmp_path, SCRAMBLED)
    path = run / TAG / "mp_rank_00_model_states.pt"
    _edit(path, lambda state: {**state, "ds_config": "ds.json"})
    assert "order of parameters is that of round robin" in _refused(run, "zero-round-robin", master=True).what

    def reorder(state: Any) -> Any:
        groups = [{n: g[n] for n in state["module"] if n in g} for g in state["param_shapes"]]
        return {**state, "param_shapes": groups}

    _edit(path, reorder)
    assert "is not the weight in the model file" in _refused(run, "zero-mixed", master=True).what


def test_the_folder_its_parent_and_the_runs_folder_are_one_checkpoint(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    parent = Path(shutil.copytree(UNIVERSAL / "roundrobin-aligned-z2-n3", run / "checkpoint-2"))
    found = [SOURCE.open(p, asked=str(p)) for p in (parent / TAG, parent, run)]
    assert len({f.origin.header_digest for f in found}) == 1
    assert found[0].origin.stored_format == "universal, of ZeRO-2, 3 ranks"
    assert "`latest_universal` says so" in found[1].said[0]
    assert [kind_of(p) for p in (parent / TAG, parent)] == ["deepspeed_universal"] * 2
    assert find_place(run, str(run)).folder == parent / TAG


def test_latest_universal_is_obeyed_and_a_tag_overrules_it(tmp_path: Path) -> None:
    run = _copy(tmp_path, "lora-z3-n2")
    shutil.copytree(UNIVERSAL / SCRAMBLED / TAG, run / "global_step10_universal")
    assert SOURCE.open(run, asked="x").origin.stored_format == "universal, of ZeRO-3, 2 ranks"
    other = SOURCE.open_tag(run, asked="x", tag="global_step10_universal")
    assert other.origin.stored_format == "universal, of ZeRO-2, 3 ranks"
    assert TAG in str(_refused(run, "no-such-tag", tag="global_step3_universal").expected)
    (run / "latest_universal").write_text("global_step7_universal")
    assert "global_step7_universal" in _refused(run, "zero-latest").what
    (run / "latest_universal").unlink()
    assert isinstance(_refused(run, "several-checkpoints"), UsageError)


def test_ranks_own_files_are_preferred_and_that_is_said(tmp_path: Path) -> None:
    run = _copy(tmp_path, SCRAMBLED)
    shutil.copytree(RUNS / SCRAMBLED / "global_step2", run / "global_step2")
    (run / "latest").write_text("global_step2")
    place = find_place(run, str(run))
    assert place.folder == run / "global_step2"
    assert f"{TAG} is there too: the ranks' own files are preferred" in place.why
    assert find_place(run, str(run), tag=TAG).folder == run / TAG
    assert kind_of(run) == "deepspeed"


def test_a_parameter_whose_folder_is_gone_is_named(tmp_path: Path) -> None:
    run = _copy(tmp_path, "lora-z3-n2")
    names = sorted(p.name for p in (run / TAG / "zero").iterdir() if p.is_dir())
    shutil.rmtree(run / TAG / "zero" / names[0])
    assert names[0] in _refused(run, "zero-parameter-missing").what


def test_a_widened_16_bit_weight_is_not_taken_for_a_master(tmp_path: Path) -> None:
    run = _copy(tmp_path, "roundrobin-aligned-z2-n3")
    for name in ("exp_avg.pt", "exp_avg_sq.pt", "step.pt"):  # what a parameter without gradients lacks
        (run / TAG / "zero" / "last.bias" / name).unlink()
    assert "last.bias" in _refused(run, "zero-parameter-missing", master=True).what
    assert differences(evaluated(SOURCE.open(run, asked="x").tensors), live(run)) == []


def test_a_parameter_of_another_size_is_refused_and_a_cut_vocabulary_is_called_so(tmp_path: Path) -> None:
    run = _copy(tmp_path, "roundrobin-aligned-z2-n3")
    path = run / TAG / "zero" / "last.weight" / "fp32.pt"
    _edit(path, lambda state: {**state, "param": state["param"][:-1].clone()})
    assert "[12, 7]" in _refused(run, "zero-sizes", master=True).what
    _edit(path, lambda state: {**state, "vocab_tensor": True})
    assert "padded the vocabulary" in _refused(run, "zero-sizes", master=True).what
    _edit(path, lambda state: {**state, "is_expert_param": True})
    _refused(run, "zero-experts", master=True)
    _edit(path, lambda state: {"parameter": 1})
    _refused(run, "zero-malformed", master=True)


def test_how_tensor_parallel_ranks_were_joined_is_no_matter_where_there_was_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = _copy(tmp_path, "roundrobin-aligned-z2-n3")
    # A class of DeepSpeed's name, for a pickle with the bytes that DeepSpeed writes.
    module = types.ModuleType("deepspeed.checkpoint.universal_checkpoint")
    shape = type("SubparamShape", (), {"__module__": module.__name__})
    module.SubparamShape = shape  # type: ignore[attr-defined]
    for name in ("deepspeed", "deepspeed.checkpoint", module.__name__):
        monkeypatch.setitem(sys.modules, name, module)
    joined = {"cat_dim": 1, "param_n_sub_params": 2, "sub_param_shape": shape(), "vocab_tensor": True}
    for kind in ("fp32", "exp_avg"):
        _edit(run / TAG / "zero" / "last.weight" / f"{kind}.pt", lambda state: {**state, **joined})
    monkeypatch.undo()
    assert faults(run) == []
    shutil.copy(run / TAG / "mp_rank_00_model_states.pt", run / TAG / "mp_rank_01_model_states.pt")
    _refused(run, "zero-tensor-parallel")


def test_parameters_and_model_files_of_two_runs_are_refused(tmp_path: Path) -> None:
    run = _copy(tmp_path, "lora-z3-n2")
    shutil.copy(UNIVERSAL / SCRAMBLED / TAG / "zero" / "optimizer_state.pt", run / TAG / "zero")
    _refused(run, "zero-mixed")
    run = _copy(tmp_path, SCRAMBLED)
    shutil.copy(RUNS / "reward-z2-n2" / "global_step2" / "mp_rank_00_model_states.pt", run / TAG)
    assert "[2, 3] ranks" in _refused(run, "zero-mixed").what


@pytest.mark.parametrize("count", [[[3]], [3, 2], {"a": 3}, "3", 2, None])
def test_a_number_of_ranks_that_is_none_is_refused_or_not_needed(tmp_path: Path, count: Any) -> None:
    run = _copy(tmp_path, SCRAMBLED)
    torch.save({"partition_count": count, "zero_stage": 2}, run / TAG / "zero" / "optimizer_state.pt")
    if count in ([3, 2], 2):
        _refused(run, "zero-mixed")
    else:
        assert SOURCE.open(run, asked="x").origin.stored_format.endswith("3 ranks")


def test_a_survey_lists_tensors_and_never_raises(tmp_path: Path) -> None:
    found = SOURCE.survey(UNIVERSAL / SCRAMBLED)
    assert found.error() is None
    assert found.entries["last.weight"].info.shape == (13, 7)
    run = _copy(tmp_path, "lora-z3-n2")
    for path in (run / TAG).glob("*.pt"):
        path.write_bytes(path.read_bytes()[:2000])
    assert SOURCE.survey(run).error() is not None


def test_gather_makes_the_adapter_of_a_universal_checkpoint_and_says_what_it_read(tmp_path: Path) -> None:
    run, out = _copy(tmp_path, "lora-z3-n2"), tmp_path / "out"
    done = run_command("gather", str(run), str(out))
    assert done.code == 0, done.err
    assert "universal, of ZeRO-3, 2 ranks" in done.out and "`latest_universal` says so" in done.out
    lived = {n: t for n, t in live(run).items() if ".lora_" in n or ".modules_to_save." in n}
    wanted = {n.replace(".default", "").replace(".modules_to_save", ""): t for n, t in lived.items()}
    assert differences(load_file(out / "adapter_model.safetensors"), wanted) == []


def test_gather_refuses_the_masters_of_round_robin_and_writes_nothing(tmp_path: Path) -> None:
    run, out = _copy(tmp_path, SCRAMBLED), tmp_path / "out"
    (run / "config.json").write_text('{"model_type": "odd"}')
    done = run_command("gather", str(run), str(out), "--master")
    assert (done.code, out.exists()) == (3, False)
    assert "zero-round-robin" in done.err
    done = run_command("gather", str(run), str(out))
    assert done.code == 0, done.err
    gathered = load_file(out / "model.safetensors")
    assert differences(gathered, {n: t for n, t in live(run).items() if n in gathered}) == []
    assert len(gathered) >= len(live(run)) - 1
