"""Runs of models that transformers names differently in memory and on disk, trained by DeepSpeed and gathered."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from oracle.bases import quiet
from oracle.command import run
from zero.compare import RUNS, live

PREFIX = "base_model.model."


def _gathered(tmp_path: Path, name: str, *arguments: str) -> Path:
    folder = Path(shutil.copytree(RUNS / name, tmp_path / name))
    if (folder / "config-of-run.json").exists():
        (folder / "config-of-run.json").rename(folder / "config.json")
    done = run("gather", str(folder), str(tmp_path / "out"), *arguments)
    assert done.code == 0, done.err
    return tmp_path / "out"


def _loaded(out: Path, kind: str) -> dict[str, torch.Tensor]:
    """State of the model that transformers makes of the folder; nothing may be missing or left over."""
    with quiet():
        model, info = getattr(transformers, kind).from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    state: dict[str, torch.Tensor] = model.state_dict()
    return state


@pytest.mark.parametrize(
    ("name", "kind", "on_disk"),
    [
        ("neox-z2-n2", "GPTNeoXForCausalLM", "embed_out.weight"),
        ("vision-z2-n2", "LlavaForConditionalGeneration", "language_model.model.layers.0.self_attn.q_proj.weight"),
    ],
)
def test_a_run_comes_out_under_the_names_of_its_hub_checkpoints_and_loads(
    tmp_path: Path, name: str, kind: str, on_disk: str
) -> None:
    out = _gathered(tmp_path, name)
    assert on_disk in load_file(out / "model.safetensors")
    lived, state = live(RUNS / name), _loaded(out, kind)
    assert state.keys() == lived.keys()
    assert [n for n in state if not torch.equal(state[n], lived[n])] == []


def test_lora_merged_over_the_runs_own_weights_comes_out_under_those_names_too(tmp_path: Path) -> None:
    name = "vision-lora-z2-n2"
    out = _gathered(tmp_path, name, "--emit", "merged")
    assert "language_model.model.layers.0.mlp.down_proj.weight" in load_file(out / "model.safetensors")
    lived, state = live(RUNS / name), _loaded(out, "LlavaForConditionalGeneration")
    for full, tensor in lived.items():
        if ".lora_" in full:
            continue
        plain = full.removeprefix(PREFIX).replace(".base_layer", "")
        if full.endswith(".base_layer.weight"):
            module = full.rpartition(".base_layer.")[0]
            a, b = (lived[f"{module}.lora_{x}.default.weight"].float() for x in "AB")
            tensor = (tensor.float() + 4 * (b @ a)).to(tensor.dtype)
        assert torch.equal(state.pop(plain), tensor), plain
    assert not state


def test_an_adapter_keeps_the_names_in_memory_which_are_those_that_peft_saves(tmp_path: Path) -> None:
    keys = load_file(_gathered(tmp_path, "vision-lora-z2-n2") / "adapter_model.safetensors")
    lived = [n for n in live(RUNS / "vision-lora-z2-n2") if ".lora_" in n]
    assert set(keys) == {re.sub(r"\.default\.", ".", n) for n in lived}
