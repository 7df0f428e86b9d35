"""Which folders beside a damaged one doctor names: those that a repair takes the lost tensors from, and no others."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from converter.diagnostic import commands, spelled
from doctored import SIZES, adapter, edit, finding, store
from oracle.command import run

LOST = "model.layers.0.self_attn.q_proj.weight"
FACTOR = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
ADAPTER = "adapter_model.safetensors"


def dropped(folder: Path, name: str = LOST, file: str = "model.safetensors") -> Path:
    store(folder, lambda t: {n: v for n, v in t.items() if n != name}, file)
    return folder


def halved(folder: Path, name: str = LOST, file: str = "model.safetensors") -> Path:
    store(folder, lambda t: t | {name: t[name][: len(t[name]) // 2].clone()}, file)
    return folder


def copy(folder: Path, name: str) -> Path:
    return Path(shutil.copytree(folder, folder.parent / name))


def words(folder: Path, code: str, **asked: Any) -> str:
    return str(spelled(finding(folder, code, **asked).next))


def repaired(broken: Path, code: str, file: str = "model.safetensors") -> dict[str, torch.Tensor]:
    """What the printed repair writes."""
    (command,) = commands(finding(broken, code).next)
    ran = run(command.verb, *command.arguments)
    assert ran.code == 0, ran.text
    return load_file(Path(command.arguments[1]) / file)


def is_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


@pytest.fixture
def reward_twins(reward: Path) -> Path:
    """A sound reward model under a name that it shares with its copies."""
    return reward.rename(reward.parent / "rm-sound")


def test_a_copy_with_half_a_tensor_is_not_offered_for_it(reward_twins: Path) -> None:
    broken, half = dropped(copy(reward_twins, "rm-dropped")), halved(copy(reward_twins, "rm-halved"))
    shutil.rmtree(reward_twins)
    assert "nothing at hand has them" in words(broken, "tensors-missing")
    assert "nothing at hand has them" in words(half, "tensors-misshapen")
    assert "nothing at hand has them" in words(broken, "tensors-missing", weights_from=(str(half),))


@pytest.mark.parametrize("harm", [dropped, halved])
def test_a_sound_copy_is_offered_and_the_repair_from_it_is_that_copy(harm: Any, reward_twins: Path) -> None:
    broken = harm(copy(reward_twins, "rm-broken"))
    halved(copy(reward_twins, "rm-also-broken"))
    code = "tensors-missing" if harm is dropped else "tensors-misshapen"
    assert is_equal(repaired(broken, code), load_file(reward_twins / "model.safetensors"))


def test_a_checkpoint_of_another_step_is_named_and_no_repair_from_it_is_printed(reward: Path) -> None:
    reward = reward.rename(reward.parent / "checkpoint-30")
    broken = dropped(copy(reward, "checkpoint-20"))
    halved(copy(reward, "checkpoint-10"))
    said = words(broken, "tensors-missing")
    assert said.startswith(f"{reward} has them, of another step") and "repair" not in said


def test_a_copy_of_another_width_is_not_offered(reward_twins: Path) -> None:
    broken = dropped(copy(reward_twins, "rm-broken"))
    shutil.rmtree(reward_twins)
    LlamaForCausalLM(LlamaConfig(**SIZES | {"intermediate_size": 64})).save_pretrained(broken.parent / "rm-wide")
    assert "nothing at hand has them" in words(broken, "tensors-missing")


def test_a_model_without_a_head_is_proved_by_its_base(causal: Path) -> None:
    causal.rename(causal.parent / "lm-sound")
    broken = dropped(copy(causal.parent / "lm-sound", "lm-broken"))
    said = words(broken, "tensors-missing")
    assert f"--weights-from {causal.parent / 'lm-sound'} with --base" in said


@pytest.mark.filterwarnings("ignore")
def test_a_copy_of_an_adapter_is_judged_by_itself(reward: Path) -> None:
    sound = adapter(reward, reward.parent / "lora-sound")
    edit(sound, "adapter_config.json", base_model_name_or_path="not/here")
    broken = halved(copy(sound, "lora-broken"), FACTOR, ADAPTER)
    halved(copy(sound, "lora-also-broken"), FACTOR, ADAPTER)
    assert is_equal(repaired(broken, "adapter-inconsistent", ADAPTER), load_file(sound / ADAPTER))
    shutil.rmtree(sound)
    shutil.rmtree(sound.parent / "lora-broken-fixed")
    assert "nothing at hand has them" in words(broken, "adapter-inconsistent")


@pytest.mark.filterwarnings("ignore")
def test_a_module_that_an_adapter_lost_is_taken_from_a_copy(reward: Path, tmp_path: Path) -> None:
    sound = adapter(reward, reward.parent / "lora-sound")
    edit(sound, "adapter_config.json", base_model_name_or_path="not/here")
    layers = (f".layers.{n}." for n in range(1, 3))
    store(sound, lambda t: t | {n.replace(".layers.0.", x): v + 1 for x in layers for n, v in t.items()}, ADAPTER)
    broken = copy(sound, "lora-broken")
    store(broken, lambda t: {n: v for n, v in t.items() if ".layers.1." not in n}, ADAPTER)
    assert is_equal(repaired(broken, "adapter-inconsistent", ADAPTER), load_file(sound / ADAPTER))
