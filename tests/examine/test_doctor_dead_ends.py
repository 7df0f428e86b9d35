"""What doctor promises where something is lost or cut: no conversion that would be refused, no fault that a file hides,
no trainer that would read it.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from converter.cli import main
from converter.diagnostic import is_command
from converter.examine.doctor import DoctorRequest, examine
from doctored import SIZES, adapter, codes, edit, finding, store


@pytest.fixture
def headless(causal: Path, tmp_path: Path) -> Path:
    """What PEFT saves of a reward model wrapped without a task type: no head, and the class in auto_mapping."""
    made = adapter(causal, tmp_path / "reward-adapter")
    store(made, lambda t: {n: v for n, v in t.items() if "score" not in n}, "adapter_model.safetensors")
    mapping = {"base_model_class": "LlamaForSequenceClassification", "parent_library": "transformers"}
    edit(made, "adapter_config.json", task_type=None, modules_to_save=None, auto_mapping=mapping)
    return made


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_whose_class_alone_says_that_it_is_a_reward_model_lacks_its_head(headless: Path) -> None:
    assert codes(headless) == {"head-missing": "error"}
    assert finding(headless, "head-missing").recoverability == "lost"


@pytest.mark.filterwarnings("ignore")
def test_a_head_that_the_absent_base_may_have_is_not_called_lost(headless: Path) -> None:
    edit(headless, "adapter_config.json", base_model_name_or_path="/models/of-another-machine")
    found = finding(headless, "head-missing")
    assert found.recoverability == ""
    assert "the base, which may have one, is not here" in found.text


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_beside_over_another_base_has_no_head_of_this_one(headless: Path, causal: Path) -> None:
    stranger = adapter(causal, headless.parent / "reward-other")
    assert finding(headless, "head-missing").recoverability == f"from {stranger}"
    edit(stranger, "adapter_config.json", base_model_name_or_path="another/base")
    assert finding(headless, "head-missing").recoverability == "lost"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("broken", ["adapter", "model", "empty"])
def test_no_conversion_is_printed_that_what_is_lost_would_stop(broken: str, headless: Path, reward: Path) -> None:
    if broken == "model":
        store(reward, lambda t: {n: v for n, v in t.items() if n != "score.weight"})
    elif broken == "empty":
        store(reward, lambda t: {n: v.new_empty(0) if n == "score.weight" else v for n, v in t.items()})
    folder = headless if broken == "adapter" else reward
    loaders = [f for f in examine(DoctorRequest(str(folder), target="openrlhf")).findings if "loader" in f.code]
    assert loaders
    assert not any(is_command(f.next) or f.recoverability for f in loaders)


@pytest.mark.parametrize("cut", ["file", "shard"])
def test_what_a_cut_file_hides_is_not_missing_and_no_trainer_reads_the_rest(cut: str, tmp_path: Path) -> None:
    model = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=False))
    model.save_pretrained(tmp_path / "lm", max_shard_size="4KB")
    shards = sorted((tmp_path / "lm").glob("*.safetensors"))
    holder = next(s for s in shards if b"lm_head" in s.read_bytes())
    if cut == "file":
        holder.write_bytes(holder.read_bytes()[:-8])
    else:
        holder.unlink()
    said = {"file": "file-truncated", "shard": "shard-missing"}[cut]
    assert codes(tmp_path / "lm", target="openrlhf") == {said: "error"}


def test_an_output_embedding_that_is_in_no_file_is_still_an_error(causal: Path) -> None:
    edit(causal, tie_word_embeddings=False)
    store(causal, lambda t: {n: v for n, v in t.items() if n != "lm_head.weight"})
    assert "output-embedding-missing" in codes(causal)


@pytest.mark.filterwarnings("ignore")
def test_a_byte_order_mark_is_taken_away_by_the_command_that_is_printed(causal: Path, tmp_path: Path) -> None:
    made = adapter(causal, tmp_path / "an adapter")
    config = made / "adapter_config.json"
    config.write_bytes(b"\xef\xbb\xbf" + config.read_text().replace("\n", "\r\n").encode())
    step = str(finding(made, "config-unreadable").next)
    subprocess.run(["bash", "-c", step.partition(": ")[2]], check=True)
    assert codes(made) == {}
    config.write_text("{")
    assert finding(made, "config-unreadable").next == "copy adapter_config.json from another checkpoint of the run"


def test_an_index_that_names_files_of_another_time_is_repaired_by_the_shards_that_are_here(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, folder = LlamaForCausalLM(LlamaConfig(**SIZES)), tmp_path / "lm"
    model.save_pretrained(folder, max_shard_size="4KB")
    index = folder / "model.safetensors.index.json"
    value = json.loads(index.read_text())
    value["weight_map"] = {n: f"old-{f}" for n, f in value["weight_map"].items()}
    index.write_text(json.dumps(value))
    assert codes(folder) == {"weight-sets": "error"}
    assert main(["repair", str(folder), str(tmp_path / "fixed"), "-q"]) == 0
    here = {n: t for f in (tmp_path / "fixed").glob("*.safetensors") for n, t in load_file(f).items()}
    there = {n: t for f in folder.glob("*.safetensors") for n, t in load_file(f).items()}
    assert all(here[n].equal(t) for n, t in there.items()) and here.keys() == there.keys()
    next(folder.glob("model-00002*")).unlink()
    assert "shard-missing" in codes(folder)
    capsys.readouterr()


@pytest.mark.filterwarnings("ignore")
def test_a_repair_of_the_base_is_not_written_where_the_merge_should_be(
    causal: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = adapter(causal, tmp_path / "adapter")
    LlamaForCausalLM.from_pretrained(causal).save_pretrained(causal, max_shard_size="4KB")
    (causal / "model.safetensors").unlink(missing_ok=True)
    index = causal / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("-of-", "-of-1"))
    assert main(["merge-lora", str(made), str(tmp_path / "merged"), "--base", str(causal)]) == 3
    said = capsys.readouterr().err
    assert f"repair {causal} {causal}-fixed" in said, said
