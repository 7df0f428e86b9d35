"""QLoRA runs gathered: merged into their own quantised weights, or into the base that is named; nothing is guessed.

The state is what DeepSpeed writes of a module whose frozen weights bitsandbytes has quantised; the oracle is PEFT's
merge over the same weights made whole.
"""

from __future__ import annotations

import shutil
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import oracle
import quantised
from oracle.bases import edit_config, read_config, read_tensors
from oracle.command import listing, run

PREFIX = "base_model.model."
TARGETS = ("q_proj", "down_proj")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> quantised.Folder:
    """`quantised/`, the adapter over it, and `run/`, the state of the run that trained it."""
    home = tmp_path_factory.mktemp("qlora")
    folder = quantised.make(home, "nf4-nested")
    adapter = oracle.make_adapter(home / "adapter", folder.whole, target_modules=list(TARGETS), dtype=torch.float32)
    factors = {
        n.replace(".weight", ".default.weight"): t for n, t in load_file(adapter / "adapter_model.safetensors").items()
    }
    module = {PREFIX + _below(n): t for n, t in read_tensors(folder.path).items()} | factors
    save_state(home / "run", module, trained=list(factors))
    for source, name in ((folder.path, "config.json"), (adapter, "adapter_config.json")):
        shutil.copy(source / name, home / "run" / name)
    return folder


def _below(name: str) -> str:
    """A frozen tensor as it is called below LoRA."""
    for target in TARGETS:
        name = name.replace(f".{target}.", f".{target}.base_layer.")
    return name


def save_state(folder: Path, module: dict[str, torch.Tensor], trained: list[str]) -> None:
    tag = folder / "global_step3"
    tag.mkdir(parents=True)
    (folder / "latest").write_text("global_step3")
    shapes = OrderedDict((n, module[n].shape) for n in trained)
    state = {
        "module": OrderedDict(module), "param_shapes": [shapes], "buffer_names": [], "shared_params": {},
        "dp_world_size": 1, "global_steps": 3, "ds_version": "0.19.8", "frozen_param_shapes": None,
        "frozen_param_fragments": None, "ds_config": {},
    }  # fmt: skip
    torch.save(state, tag / "mp_rank_00_model_states.pt")


def home(made: quantised.Folder) -> Path:
    return made.path.parent


def test_the_runs_own_quantised_weights_are_made_whole_and_merged_into(made: quantised.Folder, tmp_path: Path) -> None:
    ran = run("gather", home(made) / "run", tmp_path / "out", "--emit", "merged", "--dequantize")
    assert ran.code == 0, ran.err
    expected = oracle.peft_merge(made.whole, home(made) / "adapter")
    oracle.same_bits(read_tensors(tmp_path / "out"), expected)
    assert "quantization_config" not in read_config(tmp_path / "out")
    assert "was trained over these" in ran.text


def test_both_outputs_are_the_merged_model_and_the_adapter(made: quantised.Folder, tmp_path: Path) -> None:
    ran = run("gather", home(made) / "run", tmp_path / "out", "--emit", "both", "--dequantize")
    assert ran.code == 0, ran.err
    oracle.same_bits(read_tensors(tmp_path / "out"), oracle.peft_merge(made.whole, home(made) / "adapter"))
    oracle.same_bits(read_tensors(tmp_path / "out-adapter"), read_tensors(home(made) / "adapter"))


def test_a_named_base_is_merged_into_in_place_of_the_quantised_weights(made: quantised.Folder, tmp_path: Path) -> None:
    base = oracle.make_base(tmp_path / "base", dtype="bfloat16", intermediate=96, hidden=64, seed=5)
    ran = run("gather", home(made) / "run", tmp_path / "out", "--emit", "merged", "--base", base.path)
    assert ran.code == 0, ran.err
    # The state holds fp32 factors; PEFT merges the same over the other base.
    found = read_tensors(tmp_path / "out")
    expected = oracle.peft_merge(base, home(made) / "adapter")
    oracle.same_bits(found, expected)
    assert "trained over its own quantised weights (14 NF4, doubly quantised)" in ran.text


def test_without_consent_the_merge_is_refused_with_the_same_command_and_dequantize(
    made: quantised.Folder, tmp_path: Path
) -> None:
    before = listing(tmp_path)
    ran = run("gather", home(made) / "run", tmp_path / "out", "--emit", "merged")
    assert (ran.code, listing(tmp_path)) == (3, before)
    assert "base-quantised" in ran.text and f"{tmp_path / 'out'} --emit merged --dequantize" in ran.text


def test_dequantize_is_for_a_merge_alone(made: quantised.Folder, tmp_path: Path) -> None:
    for emit in ((), ("--emit", "adapter")):
        ran = run("gather", home(made) / "run", tmp_path / "out", *emit, "--dequantize")
        assert ran.code == 2 and "--emit merged" in ran.text and not (tmp_path / "out").exists()


def test_codes_that_were_saved_without_their_scales_are_no_base(made: quantised.Folder, tmp_path: Path) -> None:
    """What a trainer saves that knows parameters alone: the base is merged into, or asked for."""
    factors = read_tensors(home(made) / "adapter")
    module = {_below(n): t for n, t in read_tensors(made.path).items()}
    whole = {PREFIX + n: t for n, t in module.items() if n.endswith(".weight")}
    whole |= {n.replace(".weight", ".default.weight"): t for n, t in factors.items()}
    save_state(tmp_path / "run", whole, trained=[n for n in whole if "lora_" in n])
    for name in ("config.json", "adapter_config.json"):
        shutil.copy(home(made) / "run" / name, tmp_path / "run" / name)
    edit_config(tmp_path / "run", "adapter_config.json", base_model_name_or_path="nobody/nothing")
    ran = run("gather", tmp_path / "run", tmp_path / "out", "--emit", "merged", "--dequantize")
    assert ran.code == 3 and "base-needed" in ran.text and not (tmp_path / "out").exists()
    ran = run("gather", tmp_path / "run", tmp_path / "out", "--emit", "merged", "--dequantize", "--base", made.path)
    assert ran.code == 0, ran.err
    oracle.same_bits(read_tensors(tmp_path / "out"), oracle.peft_merge(made.whole, home(made) / "adapter"))
