"""What two checkpoints prove of each other: steps, rounded values, and names that change when transformers saves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from converter.converters.fill.evidence import same, step_of
from converter.core.context import Context
from converter.core.tensors import nodes as tensors
from converter.core.tensors.dtypes import DType, TensorInfo
from oracle.command import run
from repair.live import PREFIX, as_adapter, copied, live, receipt, rewrite, saved
from zero.compare import RUNS as ZERO_RUNS
from zero.compare import differences
from zero.compare import live as zero_live

DTYPES = {DType.BF16: torch.bfloat16, DType.F16: torch.float16, DType.F32: torch.float32}


def _stored(folder: Path, name: str, tensor: torch.Tensor, dtype: DType) -> tensors.LazyTensor:
    file = folder / name
    file.write_bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return tensors.stored(TensorInfo(dtype, tuple(tensor.shape)), str(file), 0)


@given(bits=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=40), dtype=st.sampled_from(["BF16", "F16"]))
@settings(max_examples=60, deadline=None)
def test_masters_are_rounded_as_torch_rounds_them(
    tmp_path_factory: pytest.TempPathFactory, bits: list[int], dtype: str
) -> None:
    folder = tmp_path_factory.mktemp("pair")
    master = torch.tensor(bits, dtype=torch.int64).to(torch.int32).view(torch.float32)
    master = torch.where(master.isnan(), torch.zeros(()), master)
    kind = DType(dtype)
    rounded = _stored(folder, "rounded", master.to(DTYPES[kind]), kind)
    whole = _stored(folder, "master", master, DType.F32)
    assert same(Context(), rounded, whole)
    other = master.to(DTYPES[kind]).view(torch.int16) ^ 1
    assert not same(Context(), _stored(folder, "other", other, kind), whole)


@pytest.mark.parametrize(
    ("path", "step"),
    [
        ("/run/checkpoint-500", 500), ("/run/checkpoint-500/global_step498", 498), ("/run/global_step_7/actor", 7),
        ("/run/final", None), ("/run/checkpoint-5/adapter", 5), ("/checkpoint-9/a/b/c", None),
    ],
)  # fmt: skip
def test_a_step_is_told_by_the_nearest_folder_that_names_one(path: str, step: int | None) -> None:
    assert step_of(path) == step


def test_a_step_that_only_the_trainer_recorded_chooses_the_shards(tmp_path: Path) -> None:
    run_folder = copied(tmp_path, "lora")
    src = run_folder / "final"
    src.mkdir()
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(run_folder / "checkpoint-2" / file, src)
    (src / "trainer_state.json").write_text(json.dumps({"global_step": 2}))
    done = run("repair", src, tmp_path / "out")
    assert done.code == 0, done.err
    assert differences(saved(tmp_path / "out"), as_adapter(live("lora"))) == []


def test_an_intact_trained_factor_tells_which_of_two_steps_it_is(tmp_path: Path) -> None:
    run_folder = copied(tmp_path, "lora")
    src = run_folder / "final"
    src.mkdir()
    shutil.copy(run_folder / "checkpoint-2" / "adapter_config.json", src)
    wanted = as_adapter(live("lora", 1))
    held = wanted | {n: torch.empty(0, dtype=torch.bfloat16) for n in wanted if "lora_A" in n}
    save_file(held, src / "adapter_model.safetensors")
    done = run("repair", src, tmp_path / "out")
    assert done.code == 0, done.err
    assert differences(saved(tmp_path / "out"), wanted) == []
    assert all("checkpoint-1" in words for words in receipt(tmp_path / "out")["repaired"].values())


@pytest.mark.parametrize("name", ["neox-z2-n2", "vision-z2-n2"])
def test_names_that_transformers_changes_when_it_saves_find_their_shards(tmp_path: Path, name: str) -> None:
    import transformers

    config = transformers.AutoConfig.from_pretrained(ZERO_RUNS / name)
    model = getattr(transformers, config.architectures[0])(config)
    told = model.load_state_dict(zero_live(ZERO_RUNS / name), strict=False)
    assert not told.unexpected_keys
    src = tmp_path / "src"
    model.bfloat16().save_pretrained(src)
    wanted = load_file(src / "model.safetensors")
    matrices = [n for n, t in wanted.items() if t.dim() > 1]
    assert set(matrices) - set(zero_live(ZERO_RUNS / name))  # on disk some have other names
    rewrite(src / "model.safetensors", empty=matrices)
    done = run("repair", src, tmp_path / "out", "--weights-from", ZERO_RUNS / name)
    assert done.code == 0, done.err
    assert differences(saved(tmp_path / "out"), wanted) == []


def test_a_value_head_in_a_file_of_its_own_is_filled_too(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("repair", copied(tmp_path, "value-head") / "checkpoint-2", out).code == 0
    held = live("value-head")
    head = {n: t for n, t in held.items() if n.startswith("v_head.")}
    adapter = {n.removeprefix("pretrained_model."): t for n, t in held.items() if ".lora_" in n}
    assert differences(load_file(out / "value_head.safetensors"), head) == []
    assert differences(load_file(out / "adapter_model.safetensors"), as_adapter(adapter)) == []


def test_a_state_that_was_saved_with_pefts_names_is_filled_under_these_names(tmp_path: Path) -> None:
    run_folder = copied(tmp_path, "head")
    src = run_folder / "whole" / "checkpoint-2"
    src.mkdir(parents=True)
    held = live("head")
    lost = [f"{PREFIX}model.layers.0.self_attn.q_proj.base_layer.weight", f"{PREFIX}score.lora_A.default.weight"]
    save_file(held, src / "model.safetensors", metadata={"format": "pt"})
    rewrite(src / "model.safetensors", empty=lost)
    (src / "config.json").write_text(json.dumps({"architectures": ["MyOwnModel"], "model_type": "my_own"}))
    done = run("repair", src, tmp_path / "out", "--weights-from", run_folder / "checkpoint-2")
    assert done.code == 0, done.err
    assert "names and shapes not checked" in done.text
    assert differences(saved(tmp_path / "out"), held) == []
