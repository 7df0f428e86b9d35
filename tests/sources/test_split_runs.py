"""Runs of DeepSpeed that were split by experts, layers, or within tensors: bit-equal to what lived.

`tests/runs/zero/split.py` made the stored runs with real DeepSpeed; the oracle beside each was put together by
DeepSpeed's own communication from live parameters.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from converter.errors import ConvertError, Refused
from converter.recipe.verbs.doctor import doctor
from converter.recipe.verbs.gather import gather
from converter.sources.deepspeed.source import SOURCE
from shards import edit
from zero.compare import RUNS, STATES, differences, evaluated, live

SPLIT = RUNS.parent / "split_runs"
NAMES = sorted(p.parent.name for p in SPLIT.glob("*/fixture.json"))
TAG = "global_step2"


@pytest.fixture
def run(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A copy of the run that a test names, to break."""
    name: str = request.param
    return Path(shutil.copytree(SPLIT / name, tmp_path / name))


def of(name: str) -> Any:
    return pytest.mark.parametrize("run", [name], indirect=True)


def refused(run: Path, code: str, *, master: bool = False) -> ConvertError:
    with pytest.raises(ConvertError) as caught:
        SOURCE.open_tag(run, asked="x", master=master)
    assert caught.value.code == code, caught.value
    return caught.value


@pytest.mark.parametrize("name", NAMES)
def test_weights_masters_and_moments_are_those_that_lived(name: str) -> None:
    folder = SPLIT / name
    found = SOURCE.open(folder, asked=name)
    assert differences(evaluated(found.tensors), live(folder)) == []
    masters = SOURCE.open_masters(folder, asked=name)
    trained = (masters.trained or frozenset()) - {n for group in masters.ties for n in group[1:]}
    assert trained
    for kind in STATES:
        which: Any = kind
        made = (
            {n: masters.tensors[n] for n in trained} if kind == "master" else SOURCE.adam_moments(folder, which=which)
        )
        assert differences(evaluated(made), live(folder, kind)) == [], kind


@of("moe-z1-n4")
def test_an_expert_whose_file_is_missing_is_named(run: Path) -> None:
    (run / TAG / "layer_0_expert_2_mp_rank_00_model_states.pt").unlink()
    assert "layer_0_expert_2" in refused(run, "zero-experts").what


@of("moe-z1-n4")
def test_more_experts_than_the_run_had_are_refused(run: Path) -> None:
    file = run / TAG / "layer_1_expert_1_mp_rank_00_model_states.pt"
    shutil.copy(file, file.with_name("layer_1_expert_2_mp_rank_00_model_states.pt"))
    assert "more experts" in refused(run, "zero-experts").what


@of("moe-z1-n4")
def test_an_expert_in_anothers_file_is_refused(run: Path) -> None:
    file = run / TAG / "layer_0_expert_1_mp_rank_00_model_states.pt"
    shutil.copy(file, file.with_name("layer_0_expert_2_mp_rank_00_model_states.pt"))
    assert "was saved as layer_0_expert_1" in refused(run, "zero-mixed").what


@of("moe-z1-n4")
def test_a_rank_of_experts_whose_optimizer_is_missing_loses_masters_and_no_weights(run: Path) -> None:
    next((run / TAG).glob("*pp_rank_3_*optim_states.pt")).unlink()
    assert differences(evaluated(SOURCE.open(run, asked="x").tensors), live(run)) == []
    assert "rank 3" in refused(run, "zero-rank-missing", master=True).what


@of("pipe-z1-n2")
def test_a_layer_of_a_pipeline_whose_file_is_missing_is_named(run: Path) -> None:
    (run / TAG / "layer_03-model_states.pt").unlink()
    assert "layers 3" in refused(run, "zero-pipeline").what


@of("pipe-z1-n2")
def test_a_stage_of_a_pipeline_whose_files_are_missing_is_named(run: Path) -> None:
    for path in (run / TAG).glob("*mp_rank_01*"):
        path.unlink()
    assert "mp_rank_01" in refused(run, "zero-pipeline").what


@of("pipe-z1-n2")
def test_layers_split_within_their_tensors_too_are_refused(run: Path) -> None:
    for number in (0, 1):
        file = run / TAG / "layer_03-model_states.pt"
        shutil.copy(file, file.with_name(f"layer_03-model_{number:02d}-model_states.pt"))
    assert "split over ranks within its tensors" in refused(run, "zero-pipeline").what


@pytest.mark.parametrize("run", ["pipe-z1-n2", "tp-z1-n2"], indirect=True)
def test_ranks_of_two_steps_are_refused(run: Path) -> None:
    edit(run / TAG / "mp_rank_01_model_states.pt", lambda s: s.update(global_steps=7))
    assert "different steps" in refused(run, "zero-mixed").what


@of("pipe-z1-n2")
def test_a_shared_module_that_differs_between_stages_is_refused_when_it_is_written(run: Path, tmp_path: Path) -> None:
    path = next((run / TAG).glob("*_mp_rank_01_optim_states.pt"))

    def other(state: Any) -> None:
        state["optimizer_state_dict"]["single_partition_of_fp32_groups"][0].data[:4] += 1

    edit(path, other)
    with pytest.raises(Refused) as caught:
        gather(run, tmp_path / "out", emit="state")
    assert caught.value.code == "zero-mixed"
    assert "tied_modules.shared.weight" in caught.value.what


@of("pipe-z1-n2")
def test_the_state_of_a_module_of_ones_own_is_written_under_its_names_and_called_no_model(
    run: Path, tmp_path: Path
) -> None:
    with pytest.raises(Refused) as caught:
        gather(run, tmp_path / "model")
    assert caught.value.code == "config-missing"
    assert "--emit state" in str(caught.value.next)
    gather(run, tmp_path / "out", emit="state", dtype="float32")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["rlhf-convert.json", "state.safetensors"]
    assert differences(load_file(tmp_path / "out" / "state.safetensors"), live(run, "master")) == []


def in_llama(name: str) -> str:
    """What the layers of the stored pipeline are: an embedding, three layers, a norm, a head."""
    number, _, rest = name.partition(".")
    modules = {"0": "model.embed_tokens", "4": "model.norm", "5": "lm_head"}
    return f"{modules.get(number, f'model.layers.{int(number) - 1}')}.{rest}"


def test_layers_of_a_pipeline_are_named_as_the_class_names_them_where_one_way_fits(tmp_path: Path) -> None:
    run = SPLIT / "pipe-llama-z1-n2"
    gather(run, tmp_path / "out")
    wanted = {in_llama(n): t for n, t in live(run).items()}
    assert differences(load_file(tmp_path / "out" / "model.safetensors"), wanted) == []


@of("pipe-llama-z1-n2")
@pytest.mark.parametrize("change", [{"num_hidden_layers": 4}, {"hidden_size": 16}, {"attention_bias": True}])
def test_layers_of_a_pipeline_that_are_not_the_classs_are_refused(
    run: Path, change: dict[str, Any], tmp_path: Path
) -> None:
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(Refused) as caught:
        gather(run, tmp_path / "out")
    assert (caught.value.code, "in no way" in caught.value.what) == ("zero-pipeline", True)


@of("tp-z1-n2")
def test_a_tensor_parallel_rank_that_is_missing_is_named(run: Path) -> None:
    for path in (run / TAG).glob("*mp_rank_01*"):
        path.unlink()
    assert "mp_rank_01" in refused(run, "zero-tensor-parallel").what


@of("tp-z1-n2")
def test_copies_that_differ_between_tensor_parallel_ranks_are_refused(run: Path, tmp_path: Path) -> None:
    def other(state: Any) -> None:
        state["module"]["model.norm.weight"] = state["module"]["model.norm.weight"] + 1

    edit(run / TAG / "mp_rank_01_model_states.pt", other)
    with pytest.raises(Refused) as caught:
        gather(run, tmp_path / "out")
    assert caught.value.code == "zero-mixed"
    assert "model.norm.weight" in caught.value.what


def without(*keys: str) -> Callable[[Any], None]:
    """Takes what was recorded of the split out of a model file."""

    def change(state: Any) -> None:
        for key in keys:
            state["universal_checkpoint_info"].pop(key)

    return change


@of("tp-z1-n2")
def test_patterns_of_names_say_how_tensors_were_split_where_boxes_do_not(run: Path) -> None:
    for path in (run / TAG).glob("mp_rank_*"):
        edit(path, without("affine_map"))
    assert differences(evaluated(SOURCE.open(run, asked="x").tensors), live(run)) == []


@of("tp-z1-n2")
def test_shapes_that_the_config_implies_say_how_tensors_were_split_where_nothing_is_recorded(run: Path) -> None:
    for path in (run / TAG).glob("mp_rank_*"):
        edit(path, lambda s: s.pop("universal_checkpoint_info"))
    assert differences(evaluated(SOURCE.open(run, asked="x").tensors), live(run)) == []
    (run / "config.json").unlink()
    assert "no config.json" in refused(run, "zero-tensor-parallel").what


@of("tp-z1-n2")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda p: p["ranks"][1]["pieces"][0].update(source=[0, [8, 1]]), "gaps or overlaps"),
        (lambda p: p["ranks"][0]["pieces"][0].update(scale=0.5), "multiplied"),
        (lambda p: p["ranks"][0]["pieces"][0].update(dest=[0, [1, 4]]), "boxes"),
        (lambda p: p["ranks"][0]["pieces"].clear(), "gaps or overlaps"),
        (lambda p: p.update(logical_shape=[16, 8]), "not all"),
    ],
)
def test_a_record_of_the_split_that_does_not_give_the_whole_is_refused(
    run: Path, change: Callable[[Any], None], words: str
) -> None:
    name = r"^model\.layers\.0\.self_attn\.q_proj\.weight$"
    edit(
        run / TAG / "mp_rank_00_model_states.pt",
        lambda s: change(s["universal_checkpoint_info"]["affine_map"]["params"][name]),
    )
    assert words in refused(run, "zero-tensor-parallel").what


def test_experts_of_autoep_come_out_as_transformers_saves_them(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    gather(SPLIT / "autoep-fp32-z2-n2", tmp_path / "out")
    model, told = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(told.values())
    with torch.no_grad():
        logits = model(torch.arange(1, 15).view(2, 7)).logits
    wanted = load_file(SPLIT / "autoep-fp32-z2-n2" / "oracle.safetensors")["logits/model"]
    assert torch.allclose(logits, wanted, atol=1e-7)


@pytest.mark.parametrize(("ranks", "severity"), [(2, "cosmetic"), (4, "changes-numbers"), (3, "error")])
def test_a_split_run_resumes_on_multiples_of_the_ranks_that_split_it(ranks: int, severity: str) -> None:
    report = doctor(SPLIT / "tp-z1-n2", resume_on=ranks)
    assert [f.severity for f in report.findings if f.code == "resume-on"] == [severity]
