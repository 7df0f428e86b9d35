"""`rlhf-convert gather` on distributed checkpoints: models that transformers loads, adapters that PEFT loads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dcp.compare import RUNS, live
from oracle.command import run
from zero.compare import differences

PREFIX = "base_model.model."
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft's call


def _copy(tmp_path: Path, name: str) -> Path:
    return Path(shutil.copytree(RUNS / name, tmp_path / name))


@pytest.mark.parametrize("name", ["accelerate-n2", "accelerate-full-n2", "tp-n4"])
def test_a_model_is_gathered_from_the_runs_folder_and_transformers_loads_it(tmp_path: Path, name: str) -> None:
    from transformers import LlamaForCausalLM

    out = tmp_path / "out"
    done = run("gather", str(_copy(tmp_path, name)), str(out))
    assert done.code == 0, done.err
    assert "the only checkpoint of the run" in done.out
    wanted = live(RUNS / name)
    # accelerate stores a tied pair twice, and nothing records that it is one
    stored = {n: t for n, t in wanted.items() if n != "lm_head.weight" or name == "tp-n4"}
    assert differences(load_file(out / "model.safetensors"), stored) == []
    model, told = LlamaForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(told.values()), told
    assert differences(model.state_dict(), wanted) == []


def test_a_reward_model_in_bfloat16_is_gathered_and_loaded(tmp_path: Path) -> None:
    from transformers import LlamaForSequenceClassification

    out = tmp_path / "out"
    done = run("gather", str(_copy(tmp_path, "untrained-n2") / "step-2"), str(out))
    assert done.code == 0, done.err
    model, told = LlamaForSequenceClassification.from_pretrained(out, output_loading_info=True)
    assert not any(told.values()), told
    assert differences(model.state_dict(), live(RUNS / "untrained-n2")) == []
    receipt = json.loads((out / "rlhf-convert.json").read_text())
    assert "step-2" in json.dumps(receipt["inputs"])


def _merged(scale: float) -> dict[str, torch.Tensor]:
    """W + scale * BA under transformers' names."""
    held, found = live(RUNS / "accelerate-lora-n2"), {}
    for name, tensor in held.items():
        plain = name.removeprefix(PREFIX)
        if ".lora_" in plain:
            continue
        if ".base_layer." in plain:
            a, b = (held[name.replace("base_layer", f"lora_{x}.default")] for x in "AB")
            tensor = tensor + scale * (b @ a)
        found[plain.replace(".base_layer", "")] = tensor
    return found


def test_a_lora_run_becomes_an_adapter_that_peft_loads(tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import LlamaConfig, LlamaForCausalLM

    folder, out = _copy(tmp_path, "accelerate-lora-n2"), tmp_path / "out"
    done = run("gather", str(folder), str(out))
    assert done.code == 0, done.err
    held = live(folder)
    wanted = {n.replace(".default", ""): t for n, t in held.items() if ".lora_" in n}
    assert differences(load_file(out / "adapter_model.safetensors"), wanted) == []
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(folder))
    loaded = dict(PeftModel.from_pretrained(model, out).named_parameters())
    assert all(torch.equal(loaded[n], t) for n, t in held.items() if ".lora_" in n)


def test_an_adapter_that_trainer_saved_alone_is_gathered_with_the_head_that_was_trained_whole(tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import LlamaConfig, LlamaForCausalLM

    folder, out = _copy(tmp_path, "accelerate-adapter-n2"), tmp_path / "out"
    done = run("gather", str(folder), str(out))
    assert done.code == 0, done.err
    assert "only the adapter was saved" in done.out
    model = PeftModel.from_pretrained(LlamaForCausalLM(LlamaConfig.from_pretrained(folder)), out)
    loaded = dict(model.named_parameters())
    trained = {n: t for n, t in live(folder).items() if ".lora_" in n or ".modules_to_save." in n}
    assert len(trained) == 5
    assert all(torch.equal(loaded[n], t) for n, t in trained.items())
    shutil.rmtree(folder / "checkpoint-2" / "optimizer_0")
    done = run("gather", str(folder), str(tmp_path / "none"))
    assert done.code == 3
    assert "dcp-adapter-names" in done.err
    assert "lm_head.weight" in done.err


def test_a_lora_run_is_merged_over_its_own_frozen_weights(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run("gather", str(_copy(tmp_path, "accelerate-lora-n2")), str(out), "--emit", "merged")
    assert done.code == 0, done.err
    found, wanted = load_file(out / "model.safetensors"), _merged(8 / 2)
    assert set(found) == set(wanted)
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-7)


def test_fp32_parameters_are_kept_and_others_refused_where_masters_are_asked_for(tmp_path: Path) -> None:
    done = run("gather", str(_copy(tmp_path, "accelerate-n2")), str(tmp_path / "out"), "--master")
    assert done.code == 0, done.err
    stored = {n: t for n, t in live(RUNS / "accelerate-n2").items() if n != "lm_head.weight"}
    assert differences(load_file(tmp_path / "out" / "model.safetensors"), stored) == []
    done = run("gather", str(_copy(tmp_path, "untrained-n2")), str(tmp_path / "none"), "--master")
    assert done.code == 3
    assert "dcp-no-masters" in done.err
    assert not (tmp_path / "none").exists()


def test_bytes_that_changed_after_they_were_saved_stop_the_run(tmp_path: Path) -> None:
    run_folder = _copy(tmp_path, "accelerate-n2")
    path = run_folder / "checkpoint-2" / "pytorch_model_fsdp_0" / "__1_0.distcp"
    value = live(run_folder)["model.embed_tokens.weight"][15:].contiguous().numpy().tobytes()
    raw = bytearray(path.read_bytes())
    raw[raw.index(value) + 5] ^= 1
    path.write_bytes(raw)
    done = run("gather", str(run_folder), str(tmp_path / "out"))
    assert done.code == 3
    assert "__1_0.distcp" in done.err
    assert not (tmp_path / "out").exists()


def test_several_checkpoints_are_listed_and_one_is_chosen_by_its_tag(tmp_path: Path) -> None:
    folder = _copy(tmp_path, "accelerate-n2")
    shutil.copytree(folder / "checkpoint-2", folder / "checkpoint-10")
    done = run("gather", str(folder), str(tmp_path / "out"))
    assert done.code == 2
    assert "checkpoint-10" in done.err
    done = run("gather", str(folder), str(tmp_path / "out"), "--tag", "checkpoint-10")
    assert done.code == 0, done.err
    assert "checkpoint-10" in done.out


def test_inspect_shows_what_a_distributed_checkpoint_holds(tmp_path: Path) -> None:
    done = run("inspect", str(RUNS / "accelerate-n2" / "checkpoint-2" / "pytorch_model_fsdp_0"))
    assert done.code == 0, done.err
    assert "model.embed_tokens.weight" in done.out or "12 tensors" in done.out
