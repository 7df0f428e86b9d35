"""LoRA that ms-swift's module saved over TP 2, and LoRA in verl's folders: factors, alpha and scale as they lived."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from mcore.compare import RUNS, shards, written
from megatron_ranks import edit_state
from oracle.command import run
from zero.compare import differences

TRAINED = RUNS.parent / "trained"
SWIFT, BRIDGE = TRAINED / "swift-lora-tp2", TRAINED / "lora-tp2"
ALPHA = 8


def _changed(tmp_path: Path, **arguments: Any) -> Path:
    """ms-swift's run with other arguments of its script; None for those that it does not record."""
    folder = Path(shutil.copytree(SWIFT, tmp_path / "run"))

    def change(state: dict[str, Any]) -> None:
        for name, value in arguments.items():
            setattr(state["args"], name, value)
            if value is None:
                delattr(state["args"], name)

    edit_state(shards(folder) / "common.pt", change)
    return folder


def test_each_factor_is_the_one_that_lived_though_ranks_saved_gate_and_up_by_turns(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run("gather", SWIFT, out, "--base", SWIFT / "hf")
    assert done.code == 0, done.err
    assert differences(written(out), load_file(SWIFT / "adapter.safetensors")) == []
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["lora_alpha"], config["r"], config["use_rslora"]) == (ALPHA, 4, False)


def test_rslora_of_the_training_script_is_kept(tmp_path: Path) -> None:
    folder, out = _changed(tmp_path, use_rslora=True), tmp_path / "out"
    assert run("gather", folder, out, "--base", SWIFT / "hf").code == 0
    assert json.loads((out / "adapter_config.json").read_text())["use_rslora"] is True


@pytest.mark.parametrize("recorded", [None, 4])
def test_rows_whose_order_is_not_known_are_refused(tmp_path: Path, recorded: int | None) -> None:
    """An adapter is in two parts of rows, which may be ranks' gate and up by turns, or all of gate before all of up."""
    folder, out = _changed(tmp_path, tensor_model_parallel_size=recorded), tmp_path / "out"
    done = run("gather", folder, out, "--base", SWIFT / "hf")
    assert (done.code, "in which order its rows are gate and up is not known" in done.err) == (3, True), done.err
    assert not out.exists()
    assert "megatron-lora" in run("doctor", folder).out


def test_alpha_is_found_with_the_adapter_that_verl_exported_beside_its_shards(tmp_path: Path) -> None:
    """verl records no alpha with its shards; `model/huggingface/adapter` has PEFT's config."""
    model, out = tmp_path / "global_step_10" / "actor" / "model", tmp_path / "out"
    shutil.copytree(shards(BRIDGE), model / "dist_ckpt", ignore=shutil.ignore_patterns("run_config.yaml"))
    exported = model / "huggingface" / "adapter"
    exported.mkdir(parents=True)
    names = [f"{n}_proj" for n in ("q", "k", "v", "o", "gate", "up", "down")]
    lora = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 24, "target_modules": names}
    (exported / "adapter_config.json").write_text(json.dumps(lora))
    shutil.copy(BRIDGE / "hf" / "config.json", exported.parent)
    done = run("gather", tmp_path, out)
    assert done.code == 0, done.err
    assert json.loads((out / "adapter_config.json").read_text())["lora_alpha"] == 24
    assert differences(written(out), load_file(BRIDGE / "adapter.safetensors")) == []
