"""LoRA that Megatron-Bridge's own modules saved over two tensor-parallel ranks: each factor is the one that was put in.

`tests/runs/mcore/lora.py` made PEFT's factors, put them into Megatron's fused ones, and saved these with core 0.16.1.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from converter.core.tensors.dtypes import DType, TensorInfo
from converter.core.tensors.nodes import Concat, Stored, concat, reshape
from mcore.compare import RUNS, written
from oracle.command import run
from zero.compare import differences

SAVED = RUNS.parent / "trained" / "lora-tp2"
SCALE = 8 / 4


def test_every_factor_comes_back_under_pefts_name(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run("gather", SAVED, out)
    assert done.code == 0, done.err
    assert differences(written(out), load_file(SAVED / "adapter.safetensors")) == []


def test_factors_that_ranks_have_parts_of_are_merged_in_the_same_pass(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run("gather", SAVED, out, "--base", SAVED / "hf", "--emit", "merged")
    assert done.code == 0, done.err
    factors, wanted = load_file(SAVED / "adapter.safetensors"), load_file(SAVED / "hf" / "model.safetensors")
    for name in [n for n in factors if ".lora_A." in n]:
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        update = factors[name.replace("lora_A", "lora_B")].float() @ factors[name].float()
        wanted[f"{module}.weight"] = (wanted[f"{module}.weight"].float() + SCALE * update).bfloat16()
    made = written(out)
    assert made.keys() == wanted.keys()
    assert all(torch.allclose(made[n].float(), wanted[n].float(), rtol=2**-7, atol=0) for n in wanted)


def test_one_of_a_stack_of_split_tensors_is_its_parts() -> None:
    info = TensorInfo(DType.BF16, (1, 2, 3))
    parts = [Stored(info, file, 64) for file in ("a", "b")]
    assert reshape(concat(parts, 1), (4, 3)) == Concat(
        tuple(Stored(TensorInfo(DType.BF16, (2, 3)), f, 64) for f in "ab"), 0
    )
