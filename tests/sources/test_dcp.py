"""torch's distributed checkpoints, as torch and accelerate saved them: gathered bit by bit, or refused with why."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import converter
from converter.core.tensors.byte_runs import byte_runs
from converter.errors import Refused, UsageError
from converter.sources.dcp.adapter_names import names_in_memory
from converter.sources.dcp.source import SOURCE, adam_moments
from converter.sources.finding import find_place, kind_of, sources
from converter.sources.hf.source import SOURCE as HF
from dcp.broken import copied, refused
from dcp.compare import RUNS, facts, faults, live, run_names
from zero.compare import differences, evaluated

GATHERED = [n for n in run_names() if facts(RUNS / n)["layout"] != "hf-consolidated"]


def test_the_fixtures_cover_layouts_meshes_and_ranks() -> None:
    known = [facts(RUNS / n) for n in run_names()]
    assert {f["ranks"] for f in known} == {1, 2, 3, 4}
    assert {f["mesh"] for f in known} == {"fsdp", "hsdp", "tp", "none"}
    assert {f["fsdp"] for f in known} == {1, 2}
    assert {f["layout"] for f in known} == {
        "plain", "nested", "app", "flat-optim", "accelerate-sharded", "accelerate-adapter", "accelerate-full",
        "accelerate-ranks", "hf-consolidated", "hf-shards",
    }  # fmt: skip


@pytest.mark.parametrize("name", GATHERED)
def test_weights_buffers_and_moments_equal_those_in_memory(name: str) -> None:
    assert faults(RUNS / name) == []


@pytest.mark.parametrize("name", ["accelerate-n2", "fsdp1-n2", "nested-n4", "titan-n3", "accelerate-full-n2"])
def test_both_moments_are_there_to_be_compared(name: str) -> None:
    wanted = live(RUNS / name, "exp_avg")
    assert wanted
    assert set(adam_moments(RUNS / name, which="exp_avg_sq")) == set(wanted)


def test_moments_are_had_by_the_runs_folder_through_the_python_api() -> None:
    for name in ("accelerate-n2", "accelerate-full-n2", "nested-n4"):
        found = converter.adam_moments(RUNS / name, which="exp_avg_sq")
        assert differences(evaluated(found), live(RUNS / name, "exp_avg_sq")) == []


def test_rows_over_ranks_are_copied_byte_for_byte() -> None:
    found = SOURCE.open(RUNS / "accelerate-n2", asked="x")
    assert all(byte_runs(t) is not None for t in found.tensors.values())


def test_every_type_and_shape_is_read_as_it_was_saved() -> None:
    found = SOURCE.open(RUNS / "odd-n3", asked="x").tensors
    assert {t.info.dtype.torch_name for t in found.values()} == {
        "float32", "float64", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int64", "uint8", "bool",
    }  # fmt: skip
    assert found["single"].info.shape == ()
    assert found["none"].info.shape == (0, 4)
    assert found["f32.few.0"].info.shape == (1, 3)  # one row over three ranks: two have nothing


@pytest.mark.parametrize(
    ("name", "names", "where"),
    [
        ("untrained-n2", 12, "the model is `app.model` in it"),
        ("nested-n4", 3, "the model is `model` in it"),
        ("accelerate-n2", 12, "the model is `model` in it"),
    ],
)
def test_the_model_is_found_in_the_nest_of_dictionaries(name: str, names: int, where: str) -> None:
    found = SOURCE.open(RUNS / name, asked="x")
    assert len(found.tensors) == names
    assert set(found.tensors) == set(live(RUNS / name))
    assert where in found.said


def test_what_is_not_of_the_model_is_listed_with_the_reason() -> None:
    found = SOURCE.open(RUNS / "nested-n4", asked="x")
    assert "optimizer's state, 21 entries" in found.dropped["optim.*"]
    assert "beside" in found.dropped["step"]
    assert "1 tensors beside the model are not taken: seen" in found.said
    found = SOURCE.open(RUNS / "untrained-n2", asked="x")
    assert {"rng", "app.seen", "app.step"} <= set(found.dropped)


def test_trained_tensors_are_those_that_the_optimizer_held() -> None:
    lora = SOURCE.open(RUNS / "accelerate-lora-n2", asked="x")
    assert lora.trained == {n for n in lora.tensors if "lora_" in n}
    assert len(lora.trained) == 4
    assert SOURCE.open(RUNS / "titan-n3", asked="x").trained == {"0.weight", "1.weight", "1.bias"}
    assert SOURCE.open(RUNS / "untrained-n2", asked="x").trained is None
    full = SOURCE.open(RUNS / "accelerate-full-n2", asked="x")
    assert "model.embed_tokens.weight" in (full.trained or ())


def test_an_optimizer_that_cannot_be_read_does_not_cost_the_weights(tmp_path: Path) -> None:
    run = copied(tmp_path, "accelerate-n2")
    (run / "checkpoint-2" / "optimizer_0" / ".metadata").write_bytes(b"\x80\x04.")
    found = SOURCE.open(run, asked="x")
    assert differences(evaluated(found.tensors), live(run)) == []
    assert found.trained is None
    assert any("optimizer_0 can't be read" in said for said in found.said)


def test_fp32_parameters_are_their_own_masters_and_others_have_none() -> None:
    run = RUNS / "accelerate-n2"
    assert SOURCE.open_masters(run, asked="x").tensors == SOURCE.open(run, asked="x").tensors
    with pytest.raises(Refused, match="saved in bfloat16") as caught:
        SOURCE.open_masters(RUNS / "untrained-n2", asked="x")
    assert caught.value.code == "dcp-no-masters"


def test_names_of_a_saved_adapter_become_those_that_the_optimizer_knew(tmp_path: Path) -> None:
    start = "base_model.model."
    held = [f"{start}q.lora_A.mine.weight", f"{start}score.modules_to_save.mine.dense.weight", f"{start}q.bias"]
    saved = [f"{start}q.lora_A.weight", f"{start}score.dense.weight", f"{start}q.bias"]
    assert list((names_in_memory(saved, held, tmp_path) or {}).values()) == held
    assert names_in_memory(held, held, tmp_path) is None
    with pytest.raises(Refused, match="embed") as caught:
        names_in_memory([*saved, f"{start}embed.weight"], held, tmp_path)
    assert caught.value.code == "dcp-adapter-names"


# Finding the folder


def test_the_folder_its_checkpoint_and_the_run_are_one(tmp_path: Path) -> None:
    run = copied(tmp_path, "accelerate-n2")
    (run / "tokenizer.json").write_text("{}")
    checkpoint = run / "checkpoint-2"
    places = [checkpoint / "pytorch_model_fsdp_0", checkpoint, run]
    found = [SOURCE.open(p, asked=str(p)) for p in places]
    assert len({f.origin.header_digest for f in found}) == 1
    assert all(f.config["model_type"] == "llama" and "tokenizer.json" in f.side_files for f in found)
    assert [find_place(p, "x").folder for p in places] == [places[0]] * 3
    assert [kind_of(p) for p in places[:2]] == ["dcp", "dcp"]
    assert "dcp" in sources()


def test_several_checkpoints_are_listed_and_a_tag_chooses(tmp_path: Path) -> None:
    run = copied(tmp_path, "accelerate-n2")
    shutil.copytree(run / "checkpoint-2", run / "checkpoint-10")
    error = refused(run, "several-checkpoints")
    assert str(error.expected).index("checkpoint-2") < str(error.expected).index("checkpoint-10")
    place = SOURCE.find(run, "run", tag="checkpoint-10")
    assert place is not None
    assert place.folder == run / "checkpoint-10" / "pytorch_model_fsdp_0"
    with pytest.raises(UsageError, match="checkpoint-3"):
        SOURCE.find(run, "run", tag="checkpoint-3")


def test_models_that_were_prepared_together_are_parts(tmp_path: Path) -> None:
    run = copied(tmp_path, "fsdp1-n2")
    checkpoint = run / "checkpoint-2"
    shutil.copytree(checkpoint / "pytorch_model_fsdp_0", checkpoint / "pytorch_model_fsdp_1")
    error = refused(checkpoint, "several-parts")
    assert str(error.next) == f"rlhf-convert gather {checkpoint / 'pytorch_model_fsdp_0'} OUT"
    place = SOURCE.find(run, "run", part="pytorch_model_fsdp_1")
    assert place is not None
    assert place.folder.name == "pytorch_model_fsdp_1"
    with pytest.raises(UsageError, match="critic"):
        SOURCE.find(run, "run", part="critic")


def test_the_optimizers_folder_alone_is_refused_with_where_the_model_is() -> None:
    error = refused(RUNS / "accelerate-n2" / "checkpoint-2" / "optimizer_0", "dcp-optimizer-alone")
    assert "pytorch_model_fsdp_0" in str(error.next)


def test_folders_with_gathered_weights_and_empty_ones_are_not_taken(tmp_path: Path) -> None:
    run = copied(tmp_path, "accelerate-full-n2")
    assert SOURCE.detect(run / "checkpoint-2")
    (run / "checkpoint-2" / "model.safetensors").touch()
    assert SOURCE.detect(run / "checkpoint-2") is None
    assert SOURCE.detect(tmp_path / "nowhere") is None
    assert SOURCE.find(tmp_path / "nowhere", "x") is None
    refused(tmp_path / "nowhere", "no-shards")


def test_consolidated_safetensors_are_a_model_like_any_other(tmp_path: Path) -> None:
    run = copied(tmp_path, "hf-n2")
    assert SOURCE.detect(run / "step-2") is None
    shutil.copy(run / "config.json", run / "step-2")
    found = HF.open(run / "step-2", asked="x")
    assert differences(evaluated(found.tensors), live(run)) == []
